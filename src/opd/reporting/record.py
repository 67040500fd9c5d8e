"""Records of a run: `metrics.jsonl` and `samples.jsonl`, from which every report is made.

A line is one JSON object, written whole: a killed process loses at most the line it was writing. NaN and infinity are stored
as null and read back as NaN.

Metrics whose name starts with `time/` are wall clock. They, and the counts `teacher/cache_…` of scores kept by an earlier run, alone may
differ between two runs of the same recipe and seed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from opd.durable import replacing
from opd.errors import RunFolderError
from opd.reporting.files import HISTORY_FILE, METRICS_FILE, SAMPLES_FILE, explain_os_errors, strict_json
from opd.types import RolloutSource

SCHEMA_VERSION = 1
WALL_CLOCK_PREFIX = "time/"

LATER = ("prompt_index", "teacher", "details", "joined", "special")
"""Fields of a sample that files of older versions lack."""
PER_TOKEN = ("student_logp", "teacher_logp", "sampler_logp", "student_entropy", "teacher_entropy")
TOPS = ("student_top", "teacher_top")

Who = Literal["student", "teacher"]
Phase = Literal["train", "eval"]
Record = TypeVar("Record")


@dataclass(frozen=True, kw_only=True)
class MetricsRecord:
    """One line of `metrics.jsonl`."""

    kind: Literal["step", "eval"]
    step: int
    """kind="step": number of the update, from 0. kind="eval": number of updates completed before the evaluation."""
    metrics: Mapping[str, float]
    who: Who | None = None
    """The evaluated model; None for training steps."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Confidence intervals of evaluation metrics."""
    measure: str | None = None
    """Equal in evaluations that may be compared; None may be compared with all."""
    per_prompt: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Metric → the mean over the samples of every prompt, in the order of the held-out prompts; of older versions, nothing."""


@dataclass(frozen=True, kw_only=True)
class TopTokens:
    """The likeliest tokens of one model at each response position, most likely first."""

    tokens: Sequence[Sequence[str]]
    probabilities: Sequence[Sequence[float]]
    """Of the whole vocabulary; along `tokens`."""


@dataclass(frozen=True, kw_only=True)
class TokenDetails:
    """What both models said at each response token, before the update and at temperature 1; in nats. None where nobody could tell."""

    student_logp: Sequence[float] | None = None
    """Of the token that was sampled, as are the next two."""
    teacher_logp: Sequence[float] | None = None
    sampler_logp: Sequence[float] | None = None
    student_entropy: Sequence[float] | None = None
    teacher_entropy: Sequence[float] | None = None
    student_top: TopTokens | None = None
    teacher_top: TopTokens | None = None


@dataclass(frozen=True, kw_only=True)
class SampleRecord:
    """One line of `samples.jsonl`: a response, token by token."""

    step: int
    """Number of the update it trained, from 0, or of updates completed before the evaluation."""
    phase: Phase
    who: Who
    prompt: str
    """The prompt with special tokens, as the model reads it."""
    response: str
    tokens: Sequence[str]
    """The text of each response token."""
    reverse_kl: Sequence[float] | None
    """Reverse KL (nats) at each response token; None where no teacher scored the response."""
    finished: bool
    source: RolloutSource = "student"
    answer: str | None = None
    reward: float | None = None
    prompt_index: int | None = None
    """Row of the prompt in its data set, from 0; None in files of older versions."""
    teacher: str | None = None
    """Name of the teacher that the prompt is routed to; None where there is one."""
    details: TokenDetails | None = None
    joined: Sequence[tuple[int, int, str]] = ()
    """Runs of tokens that are parts of characters: index of the first, of the one after the last, and the text that they make."""
    special: Sequence[tuple[int, int]] = ()
    """Where special tokens are in `prompt`: index of the first character, and of the one after the last."""


class MetricSink(Protocol):
    """A second place for the metrics, next to `metrics.jsonl`."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def evaluation(self, step: int, who: Who, metrics: Mapping[str, float]) -> None: ...
    def sample(self, record: SampleRecord) -> None: ...
    def close(self) -> None: ...


class RunRecorder:
    """Appends metrics and samples to a run folder; close it, or use it as a context manager.

    `resume_step` is None for a new run, and otherwise the number of updates completed in the checkpoint that the run
    goes on from. Resuming removes what that checkpoint has not seen: training lines of update `resume_step` and later,
    evaluations after `resume_step` updates, and a last line cut short. An evaluation at exactly `resume_step` stays:
    the checkpoint is of its weights.

    Raises `RunFolderError` when a new run finds another run's lines, and when the folder cannot be written.
    """

    def __init__(self, run_dir: str | Path, *, resume_step: int | None, sinks: Sequence[MetricSink] = ()) -> None:
        self.run_dir = Path(run_dir)
        self._sinks = tuple(sinks)
        with explain_os_errors("create the run folder", self.run_dir):
            self.run_dir.mkdir(parents=True, exist_ok=True)
        paths = [self.run_dir / METRICS_FILE, self.run_dir / SAMPLES_FILE]
        for path in paths:
            if resume_step is None:
                _refuse_taken(path)
            else:
                _drop_lines_after(path, resume_step)
        self._metrics, self._samples = (_LineWriter(path) for path in paths)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record update number `step`, from 0, after it completed."""
        values = _floats(metrics)
        self._metrics.append({"kind": "step", "step": step, "metrics": values})
        for sink in self._sinks:
            sink.step(step, values)

    def evaluation(
        self,
        step: int,
        who: Who,
        metrics: Mapping[str, float],
        intervals: Mapping[str, tuple[float, float]] | None = None,
        measure: str | None = None,
        per_prompt: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Record an evaluation made when `step` updates were completed."""
        values = _floats(metrics)
        bounds = {name: [float(low), float(high)] for name, (low, high) in (intervals or {}).items()}
        line = {"kind": "eval", "step": step, "who": who, "metrics": values, "intervals": bounds}
        rows = {name: [_short(value, 6) for value in row] for name, row in (per_prompt or {}).items()}
        self._metrics.append(line | ({"measure": measure} if measure else {}) | ({"per_prompt": rows} if rows else {}))
        for sink in self._sinks:
            sink.evaluation(step, who, values)

    def sample(self, record: SampleRecord) -> None:
        """Record one response."""
        assert record.reverse_kl is None or len(record.reverse_kl) == len(record.tokens), "one KL per response token"
        kl = None if record.reverse_kl is None else [float(value) for value in record.reverse_kl]
        line = {**asdict(record), "reverse_kl": kl, "reward": None if record.reward is None else float(record.reward)}
        line["details"] = None if record.details is None else _packed(record.details, len(record.tokens))
        # What is not there takes no room, as in files of older versions.
        self._samples.append({k: value for k, value in line.items() if k not in LATER or value not in (None, ())})
        for sink in self._sinks:
            sink.sample(record)

    def close(self) -> None:
        self._metrics.close()
        self._samples.close()
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> RunRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(run_dir: str | Path) -> list[MetricsRecord]:
    """Every line of `metrics.jsonl`, in the order written; no file, no records. Raises `RunFolderError`."""
    return _read(Path(run_dir) / METRICS_FILE, _metrics_record)


def read_history(run_dir: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """(step, changes) of every resumption: keys of the recipe, each with its old and new value. Unreadable lines are left out."""
    path = Path(run_dir) / HISTORY_FILE
    with explain_os_errors("read", path):
        lines = path.read_bytes().splitlines() if path.exists() else []
    found = [(line.get("step"), line.get("changed")) for raw in lines if (line := _parsed(raw)) is not None]
    return [(step, changed) for step, changed in found if isinstance(step, int) and isinstance(changed, dict)]


def comparable(records: Sequence[MetricsRecord]) -> list[MetricsRecord]:
    """The records whose `measure` is that of the last evaluation: a resumed run may change what it measures."""
    last = next((r.measure for r in reversed(records) if r.measure is not None), None)
    return [r for r in records if r.measure in (None, last)]


def read_samples(run_dir: str | Path) -> list[SampleRecord]:
    """Every line of `samples.jsonl`, in the order written; no file, no records. Raises `RunFolderError`."""
    return _read(Path(run_dir) / SAMPLES_FILE, _sample_record)


class _LineWriter:
    """Appends JSON lines without a buffer: when `append` returns, the operating system has the whole line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with explain_os_errors("open", path):
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)

    def append(self, record: Mapping[str, Any]) -> None:
        line = strict_json({"schema_version": SCHEMA_VERSION, **record})
        text = json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        # A lone surrogate has no UTF-8 form; backslashreplace writes \udXXX, which is its JSON escape.
        unwritten = memoryview((text + "\n").encode("utf-8", "backslashreplace"))
        with explain_os_errors("write", self._path):
            start = os.fstat(self._file).st_size
            try:
                while unwritten:
                    unwritten = unwritten[os.write(self._file, unwritten) :]
            except OSError:
                with suppress(OSError):  # half a line left behind would swallow the next one
                    os.ftruncate(self._file, start)
                raise

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _refuse_taken(path: Path) -> None:
    with explain_os_errors("read", path):
        taken = path.exists() and path.stat().st_size > 0
    if taken:
        raise RunFolderError(
            f"{path} already holds the records of a run, and a new run would mix with it. "
            "Resume that run, or choose another run folder, or delete this one."
        )


def _drop_lines_after(path: Path, resume_step: int) -> None:
    if not path.exists():
        return
    with explain_os_errors("rewrite", path), replacing(path) as stream:
        for raw, record in _complete_lines(path):
            if _seen_by_checkpoint(record, resume_step):
                stream.write(raw.rstrip(b"\r\n") + b"\n")


def _seen_by_checkpoint(record: Mapping[str, Any], resume_step: int) -> bool:
    is_evaluation = "eval" in (record.get("kind"), record.get("phase"))
    return record["step"] <= resume_step if is_evaluation else record["step"] < resume_step


def _complete_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line with its content. A last line that is no JSON object was cut short by a kill and is left out."""
    broken: int | None = None
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if not raw.strip():
                continue
            if broken is not None:
                raise RunFolderError(
                    f"Line {broken} of {path} is not a JSON object, and it is not the last line, so it is not the mark "
                    "of a killed run: the file was damaged or edited. Delete that line, or restore the file."
                )
            record = _parsed(raw)
            if record is None:
                broken = number
                continue
            _check_schema(record, path, number)
            yield raw, record


def _parsed(raw: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(raw)
    except ValueError:  # JSONDecodeError and UnicodeDecodeError
        return None
    return record if isinstance(record, dict) else None


def _check_schema(record: Mapping[str, Any], path: Path, number: int) -> None:
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise RunFolderError(
            f"Line {number} of {path} has schema_version {version!r}; this version of opd reads {SCHEMA_VERSION}. "
            "Read it with the version of opd that wrote it."
        )
    if not isinstance(record.get("step"), int):
        raise RunFolderError(f"Line {number} of {path} has no step number: the file was edited. Delete that line.")


def _read(path: Path, convert: Callable[[Mapping[str, Any]], Record]) -> list[Record]:
    records: list[Record] = []
    with explain_os_errors("read", path):
        if not path.exists():
            return records
        for raw, line in _complete_lines(path):
            try:
                records.append(convert(line))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise RunFolderError(
                    f"A line of {path} is not a record of opd ({type(error).__name__}: {error}): {raw[:120]!r}… "
                    "The file was edited or written by another program; delete that line."
                ) from error
    return records


def _metrics_record(line: Mapping[str, Any]) -> MetricsRecord:
    if line["kind"] not in ("step", "eval"):
        raise ValueError(f"kind is {line['kind']!r}")
    return MetricsRecord(
        kind=line["kind"],
        step=line["step"],
        metrics={name: _number(value) for name, value in line["metrics"].items()},
        who=line.get("who"),
        intervals={name: (_number(low), _number(high)) for name, (low, high) in line.get("intervals", {}).items()},
        measure=line.get("measure"),
        per_prompt={name: tuple(map(_number, row)) for name, row in line.get("per_prompt", {}).items()},
    )


def _sample_record(line: Mapping[str, Any]) -> SampleRecord:
    fields = {name: line[name] for name in SampleRecord.__dataclass_fields__ if name not in LATER}
    fields |= {name: line[name] for name in ("prompt_index", "teacher") if name in line}
    fields |= {name: tuple(map(tuple, line[name])) for name in ("joined", "special") if name in line}
    details = line.get("details")
    fields |= {
        "tokens": tuple(fields["tokens"]),
        "reverse_kl": _numbers(fields["reverse_kl"]),
        "details": None if details is None else _unpacked(details),
    }
    return SampleRecord(**fields)


def _packed(details: TokenDetails, tokens: int) -> dict[str, Any]:
    """The details as JSON holds them: four digits; a text once, in `vocabulary`; likeliest tokens as [index, probability, index, …]."""
    found: dict[str, Any] = {}
    for name in PER_TOKEN:
        values = getattr(details, name)
        assert values is None or len(values) == tokens, f"one {name} per response token"
        found |= {} if values is None else {name: [_short(value) for value in values]}
    vocabulary: dict[str, int] = {}
    for name in TOPS:
        top: TopTokens | None = getattr(details, name)
        if top is None:
            continue
        assert len(top.tokens) == len(top.probabilities) == tokens, f"one list of {name} per response token"
        found[name] = [
            [
                part
                for text, p in zip(texts, ps, strict=True)
                for part in (vocabulary.setdefault(text, len(vocabulary)), _short(p))
            ]
            for texts, ps in zip(top.tokens, top.probabilities, strict=True)
        ]
    return {**found, "vocabulary": list(vocabulary)} if vocabulary else found


def _unpacked(line: Mapping[str, Any]) -> TokenDetails:
    vocabulary = line.get("vocabulary", ())
    fields: dict[str, Any] = {name: _numbers(line.get(name)) for name in PER_TOKEN}
    for name in TOPS:
        rows = line.get(name)
        if rows is not None:
            tokens = tuple(tuple(vocabulary[index] for index in row[::2]) for row in rows)
            fields[name] = TopTokens(tokens=tokens, probabilities=tuple(tuple(map(_number, row[1::2])) for row in rows))
    return TokenDetails(**fields)


def _short(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def _numbers(values: Sequence[float | None] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(map(_number, values))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _floats(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}

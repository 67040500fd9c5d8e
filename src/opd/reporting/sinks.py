"""Metric sinks for TensorBoard, Weights & Biases and Trackio; each library is imported only when a recipe names it.

Training metrics keep the name they have in `metrics.jsonl`. Evaluation metrics, which share these names, become
`eval/student/<name>` and `eval/teacher/<name>`. Sampled answers are tables, `samples/train/student` and so on; the recipe is hparams
or the run's config.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.errors import ConfigError, MissingDependencyError
from opd.reporting.files import explain_os_errors, write_atomically
from opd.reporting.record import MetricSink, SampleRecord, Who
from opd.reporting.sample_tables import COLUMNS, SampleTables, markdown

TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID_FILE = "wandb_run_id"


def open_sinks(
    names: Sequence[str],
    run_dir: str | Path,
    *,
    resume_step: int | None,
    projects: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> list[MetricSink]:
    """The sinks called `names` ("tensorboard", "wandb", "trackio"), for a `RunRecorder`. `projects` are those of the last two by name.

    Raises `ConfigError` for another name and `MissingDependencyError` for a library that is not installed.
    """
    sinks: list[MetricSink] = []
    for name in names:
        project = (projects or {}).get(name, "opd")
        if name == "tensorboard":
            sinks.append(TensorBoardSink(run_dir, resume_step=resume_step, config=config))
        elif name == "wandb":
            sinks.append(WandbSink(run_dir, resume_step=resume_step, project=project, config=config))
        elif name == "trackio":
            from opd.reporting.trackio_sink import TrackioSink

            sinks.append(TrackioSink(run_dir, resume_step=resume_step, project=project, config=config))
        else:
            raise ConfigError(f"There is no metric sink {name!r}. Choose from 'tensorboard', 'wandb' and 'trackio'.")
    return sinks


class TensorBoardSink:
    """Writes `<run_dir>/tensorboard`, for `tensorboard --logdir <run_dir>`."""

    def __init__(
        self, run_dir: str | Path, *, resume_step: int | None, config: Mapping[str, Any] | None = None
    ) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.plugins.hparams.summary_v2 import hparams_pb
            from tensorboard.plugins.text.summary_v2 import text_pb
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise missing_sink("tensorboard") from error
        # The generated protobuf classes are invisible to a type checker.
        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        self._text_pb: Any = text_pb
        self._tables = SampleTables()
        folder = Path(run_dir) / TENSORBOARD_FOLDER
        with explain_os_errors("write", folder):
            self._writer = EventFileWriter(str(folder))
        if resume_step is not None:
            # TensorBoard then hides what the interrupted run wrote at this step and later.
            log = self._events.SessionLog(status=self._events.SessionLog.START)
            self._write(resume_step, session_log=log)
        elif config:
            self._write(0, summary=hparams_pb(flat(config)))

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._scalars(step, metrics)

    def evaluation(self, step: int, who: Who, metrics: Mapping[str, float]) -> None:
        self._scalars(step, evaluation_names(who, metrics))

    def sample(self, record: SampleRecord) -> None:
        self._texts(self._tables.add(record))

    def close(self) -> None:
        self._texts(self._tables.take())
        self._writer.close()

    def _texts(self, tables: Mapping[tuple[str, int], list[list[Any]]]) -> None:
        for (name, step), rows in tables.items():
            self._write(step, summary=self._text_pb(name, markdown(rows)))

    def _scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(step, summary=self._summaries.Summary(value=values))

    def _write(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._events.Event(step=step, wall_time=time.time(), **content))
        self._writer.flush()


class WandbSink:
    """Logs to a Weights & Biases run; a resumed run continues the same one."""

    def __init__(
        self,
        run_dir: str | Path,
        *,
        resume_step: int | None,
        project: str = "opd",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise missing_sink("wandb") from error
        folder = Path(run_dir)
        id_file = folder / WANDB_ID_FILE
        with explain_os_errors("read", id_file):
            folder.mkdir(parents=True, exist_ok=True)
            known = id_file.read_text("utf-8").strip() if resume_step is not None and id_file.exists() else None
        self._run: Any = wandb.init(
            project=project,
            name=folder.resolve().name,
            dir=str(folder),
            config=dict(config or {}),
            id=known,
            resume="allow" if known else None,
        )
        write_atomically(id_file, self._run.id.encode())
        # Our own step: wandb's refuses to go back, as it must after resuming from an earlier checkpoint.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._table: Any = getattr(wandb, "Table", None)
        self._tables = SampleTables()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**finite(metrics), "step": step})

    def evaluation(self, step: int, who: Who, metrics: Mapping[str, float]) -> None:
        self._run.log({**finite(evaluation_names(who, metrics)), "step": step})

    def sample(self, record: SampleRecord) -> None:
        self._log(self._tables.add(record))

    def close(self) -> None:
        self._log(self._tables.take())
        self._run.finish()

    def _log(self, tables: Mapping[tuple[str, int], list[list[Any]]]) -> None:
        for (name, step), rows in tables.items():
            self._run.log({name: self._table(columns=list(COLUMNS), data=rows), "step": step})


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, bool | float | str]:
    """Dotted key → value; None and lists become text, as TensorBoard's hparams take numbers, texts and truth values alone."""
    found: dict[str, bool | float | str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return found


def evaluation_names(who: Who, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"eval/{who}/{name}": value for name, value in metrics.items()}


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def missing_sink(extra: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"The recipe asks for the metric sink '{extra}', but {extra} is not installed. "
        f"Install it with pip install 'opd[{extra}]', or leave the sink out of the recipe."
    )

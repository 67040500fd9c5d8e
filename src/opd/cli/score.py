"""`opd score`: any texts in the token viewer, as a student and a teacher see them."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.cli.measured import MODEL_OPTIONS, NO_REWARD, objective_of_servers, refuse_lost_teacher, sections
from opd.cli.named import KINDS, Named, named
from opd.cli.options import Command, Given, Option, read_one
from opd.cli.places import new_file
from opd.data.rows import read_rows
from opd.errors import ConfigError, DataError, printable

if TYPE_CHECKING:
    from opd.config.run import RunSettings
    from opd.reporting.record import SampleRecord

DEFAULT_OUT = "score.html"
TEXT, PROMPT = "text", "prompt"
COMMAND = Command(
    usage="opd score FILE --student MODEL --teacher MODEL|URL [--out PAGE.html]",
    about=f"""Shows texts token by token as two models see them: log-probs, reverse KL, entropies, and the five likeliest tokens of each. Writes one
page, and the same as lines of JSON beside it. FILE has rows of prompt and response, messages that end with the assistant's, or
rows of text; a .txt file is one text. The first word of a text is what both models are given; the rest is scored.
A student is {KINDS}.""",
    options=(
        Option(name="--student", value="MODEL", help="the model that is compared with the teacher"),
        *MODEL_OPTIONS,
        Option(name="--limit", kind="count", help="use the first N rows alone"),
        Option(
            name="--out", kind="path", value="PAGE.html", help=f"a new file ({DEFAULT_OUT}); its name in .jsonl too"
        ),
    ),
    takes_recipe_keys=True,
)


def run(args: Sequence[str]) -> int:
    given = read_one(COMMAND, args, "file of texts")
    if given is None:
        return 0
    if given.get("student") is None:
        raise ConfigError(f"Give the model that is compared: --student MODEL. Usage: {COMMAND.usage}")
    subject = named(given.get("student"))
    out = new_file(given.get("out", DEFAULT_OUT), ".html")
    lines = new_file(str(out.with_suffix(".jsonl")), ".jsonl")
    settings = settings_of(subject, given)
    rows = read_texts(given.words[0], settings, given.get("limit"))
    if any(PROMPT in row for row in rows):  # a recipe's template is for rows that hold none
        settings = replace(settings, prompts=replace(settings.prompts, user_message=None))
    from transformers.utils.logging import disable_progress_bar

    from opd.config.whole import whole_config
    from opd.reporting.files import write_atomically
    from opd.reporting.loading import Loading
    from opd.trainer.score import page, score

    disable_progress_bar()
    with Loading(stream=sys.stderr) as loading:
        scored = score(whole_config(settings), rows, checkpoint=subject.checkpoint, loading=loading)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page(scored, Path(given.words[0]).name).encode("utf-8", "replace"))
    write_atomically(lines, scored.lines)
    for line in summary(scored.samples):
        print(printable(line))
    print(f"page: {out}\nlines: {lines}")
    return 0


def settings_of(subject: Named, given: Given) -> RunSettings:
    """The recipe of the two models. Raises OpdError before torch is imported."""
    from opd.config.recipe import check, merge
    from opd.folders import MODEL_FILES, check_folder

    words = sections(subject, given)
    refuse_lost_teacher(subject, words)
    teachers = [words.get("teacher"), *(words.get("teachers") or {}).values()]
    if not any(teachers):
        raise ConfigError(f"Give the teacher: --teacher MODEL|URL. Usage: {COMMAND.usage}")
    path = given.words[0]
    overrides: dict[str, Any] = {
        "prompts.path": path,
        "prompts.eval_path": path,
        "prompts.limit": None,
        "eval": {"every": 1, "prompts": given.get("limit") or sys.maxsize, "reward": NO_REWARD},
        "rollout.max_new_tokens": 1,  # nothing is drawn
        "train.prompts_per_step": 1,
    }
    overrides |= objective_of_servers(words)
    settings = check(merge(words, overrides))
    check_folder("student", settings.student.model, MODEL_FILES)
    for name, teacher in settings.all_teachers.items():
        if teacher.model and not teacher.url:
            check_folder(name, teacher.model, MODEL_FILES)
    return settings


def read_texts(path: str, settings: RunSettings, limit: int | None) -> list[dict[str, Any]]:
    """Rows of prompt and response; of texts, the first word is the prompt. Raises DataError for a file that cannot be read."""
    if path.endswith(".txt"):
        file = Path(path)
        if not file.is_file():
            raise DataError(f"There is no file '{path}'; check the path, which is relative to where opd runs.")
        try:
            return [_of_text({TEXT: file.read_text("utf-8")}, path)]
        except UnicodeDecodeError:
            raise DataError(f"'{path}' is not UTF-8; save it as UTF-8.") from None
    rows: list[dict[str, Any]] = []
    for place, row in read_rows(path, settings.prompts.split):
        if limit is not None and len(rows) == limit:
            break
        is_text = isinstance(row.get(TEXT), str) and settings.prompts.prompt_column not in row
        rows.append(_of_text(row, place) if is_text and "messages" not in row else dict(row))
    return rows


def summary(samples: Sequence[SampleRecord]) -> list[str]:
    """One line for every text, and one for all: tokens, mean reverse KL, mean log-prob of both models, the worst token."""
    lines = [_line(f"row {sample.prompt_index}", sample.tokens, *_numbers(sample)) for sample in samples]
    everything = [_numbers(sample) for sample in samples]
    kl, student, teacher = ([value for one in everything for value in one[i]] for i in range(3))
    tokens = [token for sample in samples for token in sample.tokens]
    return [*lines, _line(f"all {len(samples):,}", tokens, kl, student, teacher)] if len(samples) > 1 else lines


def _of_text(row: Any, place: str) -> dict[str, Any]:
    text: str = row[TEXT]
    start = text[len(text) - len(text.lstrip()) :]
    word = start.split(None, 1)[0] if start else ""
    head = text[: len(text) - len(start)] + word
    if not word or head == text:
        raise DataError(f"{place} has no second word, so there is nothing to score; remove it.")
    rest = {name: value for name, value in row.items() if name not in (TEXT, PROMPT, "response")}
    return {**rest, PROMPT: head, "response": text[len(head) :], "opd_text": True}


def _numbers(sample: SampleRecord) -> tuple[Sequence[float], Sequence[float], Sequence[float]]:
    """Reverse KL, the student's log-prob and the teacher's, at every token; nothing where nobody could tell."""
    details = sample.details
    student = () if details is None else details.student_logp or ()
    teacher = () if details is None else details.teacher_logp or ()
    return sample.reverse_kl or (), student, teacher


def _line(
    name: str, tokens: Sequence[str], kl: Sequence[float], student: Sequence[float], teacher: Sequence[float]
) -> str:
    known = [value for value in kl if math.isfinite(value)]
    parts = [f"{len(tokens):,} tokens"]
    parts += [f"reverse KL {_mean(known):.4g} nats"] if known else []
    parts += [
        f"log-prob {_mean(values):.4g} ({who})"
        for who, values in (("student", student), ("teacher", teacher))
        if values
    ]
    if known:
        worst = max(range(len(kl)), key=lambda i: kl[i] if math.isfinite(kl[i]) else -math.inf)
        parts.append(f"worst token {tokens[worst]!r} at {kl[worst]:.3g}")
    return f"{name}: {', '.join(parts)}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

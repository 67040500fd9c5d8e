"""`opd eval`: evaluates any model as a run evaluates its student."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.cli.measured import (
    MODEL_OPTIONS,
    NO_REWARD,
    first_has_answer,
    objective_of_servers,
    refuse_lost_teacher,
    sections,
    with_prompts,
)
from opd.cli.named import KINDS, Named, named
from opd.cli.options import Command, Given, Option, read_one
from opd.cli.places import new_folder
from opd.errors import ConfigError, printable

if TYPE_CHECKING:
    from opd.config import Config
    from opd.config.run import RunSettings
    from opd.trainer.measure import Measured

COMMAND = Command(
    usage="opd eval MODEL [--prompts FILE] [--teacher MODEL|URL] [--reward NAME] [--out DIR] [--json]",
    about=f"""Evaluates a model with the code, the seeds and the intervals of a run's own evaluations: reward, reverse and forward KL to the
teacher, length, and the share of answers that were cut off. MODEL is {KINDS}.
A run and a recipe bring their prompts, teacher and reward; a run's numbers come out as it wrote them down. Nothing is trained.""",
    options=(
        Option(name="--prompts", kind="path", value="FILE", help="held-out prompts, in any format that a run reads"),
        *MODEL_OPTIONS,
        Option(name="--reward", value="NAME", help="exact_match, numeric_answer, regex:…, module:function, or none"),
        Option(name="--samples", kind="count", help="samples per prompt (1)"),
        Option(name="--limit", kind="count", help="use the first N prompts alone"),
        Option(name="--max-new-tokens", kind="count", help="tokens after which an answer is cut off (256)"),
        Option(name="--temperature", kind="number", help="of sampling; 0 is greedy (1)"),
        Option(name="--seed", kind="count", lowest=0, help="of sampling (0)"),
        Option(name="--teacher-too", kind="flag", help="evaluate the teacher's own answers as well"),
        Option(
            name="--out", kind="path", value="DIR", help="write eval.json, metrics, samples and a page, report.html"
        ),
        Option(name="--json", kind="flag", help="print one JSON document"),
    ),
    takes_recipe_keys=True,
)
KEY_OF = {
    "samples": "eval.samples_per_prompt",
    "max_new_tokens": "rollout.max_new_tokens",
    "temperature": "eval.temperature",
    "reward": "eval.reward",
}
TITLES = {
    "accuracy": "accuracy",
    "reverse_kl": "reverse KL (nats)",
    "forward_kl": "forward KL (nats)",
    "response_length": "length (tokens)",
    "truncated": "cut off",
}


def run(args: Sequence[str]) -> int:
    given = read_one(COMMAND, args, "model to evaluate")
    if given is None:
        return 0
    subject = named(given.words[0])
    settings = settings_of(subject, given)
    out = None if given.get("out") is None else new_folder(given.get("out"))
    from transformers.utils.logging import disable_progress_bar

    from opd.config.whole import whole_config
    from opd.reporting.loading import Loading
    from opd.trainer.measure import measure

    disable_progress_bar()
    config = whole_config(settings)
    with Loading(stream=sys.stderr) as loading:  # the table alone goes to stdout
        measured = measure(
            config, checkpoint=subject.checkpoint, teacher_too=bool(given.get("teacher_too")), loading=loading
        )
    for warning in measured.warnings:
        print(f"warning: {printable(warning)}", file=sys.stderr)
    document = document_of(subject, config, measured, notes_of(config, measured, given))
    text = json.dumps(document, indent=2, ensure_ascii=False)
    print(text if given.get("json") else "\n".join(_lines(document)))
    if out is not None:
        _write(out, measured, text)
    return 0


def settings_of(subject: Named, given: Given) -> RunSettings:
    """The recipe of this evaluation, checked, with its files. Raises OpdError before torch is imported."""
    from opd.config.recipe import check, merge
    from opd.doctor.paths import check_paths
    from opd.rewards import load_reward

    words = sections(subject, given)
    refuse_lost_teacher(subject, words)
    if not subject.recipe and given.get("prompts") is None:
        raise ConfigError(f"Give prompts for '{subject.name}', e.g. --prompts test.jsonl. Usage: {COMMAND.usage}")
    words = with_prompts(words, given.get("prompts"), given.get("limit"))
    words = merge(words, {key: given.get(name) for name, key in KEY_OF.items() if given.get(name) is not None})
    words = merge(words, objective_of_servers(words))
    if "reward" not in words["eval"] and not first_has_answer(words):
        words["eval"]["reward"] = NO_REWARD
    settings = check(words)
    if settings.eval.reward != NO_REWARD:
        load_reward(settings.eval.reward)
    check_paths(settings)
    return settings


def document_of(subject: Named, config: Config, measured: Measured, notes: Sequence[str]) -> dict[str, Any]:
    """What was evaluated, and what was found, as plain values."""
    from opd.config.recipe import to_dict
    from opd.reporting.banner import teacher_names
    from opd.reporting.files import strict_json

    evaluator = measured.parts.evaluator
    assert evaluator is not None
    document: dict[str, Any] = {
        "model": subject.name if subject.checkpoint is None else str(subject.checkpoint),
        "teacher": " + ".join(teacher_names(to_dict(config))) or None,
        "prompts": config.prompts.path,
        "prompts_used": len(evaluator.prompts),
        "samples_per_prompt": config.eval.samples_per_prompt,
        "temperature": config.eval.temperature,
        "max_new_tokens": config.rollout.max_new_tokens,
        "reward": config.eval.reward if measured.judged else None,
        "seed": config.seed,
    }
    for who, evaluation in (("student", measured.student), ("teacher", measured.teacher)):
        if evaluation is not None:
            metrics, intervals = measured.numbers(evaluation)
            document["result" if who == "student" else "teacher_result"] = {"metrics": metrics, "intervals": intervals}
    document["notes"] = notes
    return strict_json(document)


def notes_of(config: Config, measured: Measured, given: Given) -> list[str]:
    """Sentences about what is not among the numbers, and about answers that were cut off."""
    from opd.reporting.findings import MANY_CUT

    teacher, notes = measured.parts.teacher, list[str]()
    if teacher is not None and teacher.exact_kind is None:
        notes.append(
            "No KL: the teacher's server sends log-probs of some tokens, and a KL needs all. Use opd serve-teacher (--teacher.api opd), or a "
            "teacher in this process."
        )
    if not measured.judged and given.get("reward") != NO_REWARD:
        notes.append("No reward: the prompts have no reference answer. Give one with --reward module:function.")
    truncated = measured.student.metrics["truncated"]
    if truncated >= MANY_CUT:
        notes.append(
            f"{truncated:.0%} of the answers were cut off at {config.rollout.max_new_tokens} tokens; a higher --max-new-tokens gives them room."
        )
    return notes


def _lines(document: Mapping[str, Any]) -> list[str]:
    """The document as text for a terminal or a log."""
    several = document["samples_per_prompt"]
    head = document["model"] + (f" ← {document['teacher']}" if document["teacher"] else "")
    facts = [
        f"{document['prompts_used']:,} prompts of {document['prompts']}",
        f"{several} sample{'s' if several > 1 else ''} each at temperature {document['temperature']:g}",
        f"at most {document['max_new_tokens']:,} tokens",
        *([f"reward {document['reward']}"] if document["reward"] else []),
        f"seed {document['seed']}",
    ]
    columns = [("", document["result"])]
    if "teacher_result" in document:
        columns = [("student", document["result"]), ("teacher", document["teacher_result"])]
    names = list(document["result"]["metrics"])
    titles = {name: _title(name) for name in names}
    cells = {title: {name: _cell(name, column) for name in names} for title, column in columns}
    width = max(map(len, titles.values()))
    widths = {title: max(len(title), *map(len, own.values())) for title, own in cells.items()}
    rows = [[titles[name], *(f"{own[name]:<{widths[title]}}" for title, own in cells.items())] for name in names]
    if len(columns) > 1:
        rows.insert(0, ["", *(f"{title:<{widths[title]}}" for title in cells)])
    table = ["  ".join([f"{row[0]:<{width}}", *row[1:]]).rstrip() for row in rows]
    notes = [f"note: {note}" for note in document["notes"]]
    return [printable(line) for line in (head, ", ".join(facts), "", *table, *notes)]


def _title(name: str) -> str:
    from opd.reporting.summary import column_title

    return TITLES.get(name) or column_title(name)


def _cell(name: str, column: Mapping[str, Any]) -> str:
    from opd.reporting.summary import NO_VALUE, number, share

    value, last = column["metrics"].get(name), name.rpartition("/")[2]
    interval = column["intervals"].get(name)
    if value is None:
        return NO_VALUE
    if last.startswith("accuracy") or last == "truncated":
        return share(value, interval)
    return f"{value:,.1f}" if last == "response_length" else number(value, interval)


def _write(out: Path, measured: Measured, text: str) -> None:
    from opd.config.recipe import to_yaml
    from opd.reporting.files import CONFIG_FILE, write_atomically
    from opd.reporting.report import write_report
    from opd.trainer.measure import write_measured

    write_measured(out, measured, text)
    write_atomically(out / CONFIG_FILE, to_yaml(measured.parts.config).encode())
    print(f"page: {write_report(out, remarks=[])}", file=sys.stderr)

"""Run folder → `report.html`, one file that needs no other file and no network."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from opd.errors import RunFolderError
from opd.reporting.about import read_state
from opd.reporting.files import (
    CONFIG_FILE,
    METRICS_FILE,
    REPORT_FILE,
    SAMPLES_FILE,
    STATE_FILE,
    SUMMARY_FILE,
    explain_os_errors,
    strict_json,
    write_atomically,
)
from opd.reporting.plots import chart_groups, summary_figure
from opd.reporting.progress import duration
from opd.reporting.record import MetricsRecord, SampleRecord, comparable, read_history, read_metrics, read_samples
from opd.reporting.series import Curves
from opd.reporting.summary import SummaryRow, read_summary, summary_cells, summary_notes, summary_rows
from opd.reporting.tokens import (
    DARK_SCALE,
    LIGHT_SCALE,
    MAX_TOKENS_SHOWN,
    SamplePair,
    coloured_tokens,
    level_labels,
    mean_kl,
    pair_samples,
    scale_css,
)

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One headline number."""

    label: str
    value: str
    detail: str = ""


def write_report(run_dir: str | Path, out: str | Path | None = None, title: str | None = None) -> Path:
    """Write the report of a run, finished or not, to `out` (default `<run_dir>/report.html`).

    The page names whatever the folder lacks. Raises `RunFolderError` when the folder is no run folder or cannot be written.
    """
    folder = Path(run_dir)
    _refuse_other_folders(folder)
    destination = folder / REPORT_FILE if out is None else Path(out)
    state = read_state(folder)
    page = render_report(
        title=title or folder.resolve().name,
        metrics=read_metrics(folder),
        samples=read_samples(folder),
        summary=read_summary(folder),
        config=_read_config(folder),
        history=read_history(folder),
        live=state is not None and state.name in ("loading", "running") and state.alive,
    )
    with explain_os_errors("create", destination.parent):
        destination.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(destination, page.encode("utf-8", "replace"))
    return destination


def render_report(
    *,
    title: str,
    metrics: Sequence[MetricsRecord],
    samples: Sequence[SampleRecord] = (),
    summary: Mapping[str, Any] | None = None,
    config: str | None = None,
    history: Sequence[tuple[int, Mapping[str, Any]]] = (),
    live: bool = False,
) -> str:
    """The page as HTML text; a `live` one loads itself again."""
    from plotly.offline import get_plotlyjs  # takes a second to import; only a report needs it

    rows = summary_rows(summary or {})
    metrics = comparable(metrics)
    curves = Curves(metrics)
    groups = chart_groups(curves, rows)
    column_titles, cells = summary_cells(rows)
    pairs = pair_samples(samples)
    steps = sum(record.kind == "step" for record in metrics)
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["json"] = _inline_json
    return environment.get_template("report.html.jinja").render(
        title=title,
        subtitle=_subtitle(curves, metrics, steps),
        tiles=_tiles(curves, rows, summary or {}, steps),
        column_titles=column_titles,
        rows=cells,
        summary_figure=summary_figure(rows),
        groups=groups,
        notices=[*_notices(metrics, samples, rows), *summary_notes(summary or {}), *_changes(history)],
        pairs=[_pair_view(pair) for pair in pairs],
        legend=level_labels(),
        config=config,
        css=Markup(_asset("report.css")),
        light_scale=Markup(scale_css(LIGHT_SCALE)),
        dark_scale=Markup(scale_css(DARK_SCALE)),
        script=Markup(_asset("report.js")),
        live_script=Markup(_asset("live.js")) if live else None,
        viewer_script=Markup(_asset("viewer.js")),
        viewer_css=Markup(_asset("viewer.css")),
        plotly=Markup(get_plotlyjs()) if groups or rows else None,
    )


def _refuse_other_folders(folder: Path) -> None:
    if not folder.is_dir():
        raise RunFolderError(f"There is no folder {folder}. Give the folder that training wrote its run to.")
    if not any((folder / name).exists() for name in (METRICS_FILE, SAMPLES_FILE, SUMMARY_FILE, STATE_FILE)):
        raise RunFolderError(
            f"{folder} is not a run folder: it has none of {METRICS_FILE}, {SAMPLES_FILE} and {SUMMARY_FILE}. "
            "Give the folder that training wrote its run to."
        )


def _read_config(folder: Path) -> str | None:
    path = folder / CONFIG_FILE
    with explain_os_errors("read", path):
        return path.read_text("utf-8", errors="replace") if path.exists() else None


def _subtitle(curves: Curves, metrics: Sequence[MetricsRecord], steps: int) -> str:
    if not metrics:
        return ""
    first, last = curves.first, curves.last
    evaluations = len({record.step for record in metrics if record.kind == "eval"})
    words = [_count(steps, "training step"), f"steps {first} to {last}" if last > first else f"step {first}"]
    return " · ".join([*words, _count(evaluations, "evaluation")])


def _tiles(curves: Curves, rows: Sequence[SummaryRow], summary: Mapping[str, Any], steps: int) -> list[Tile]:
    by_title = {row.title: row for row in rows}
    before, after, teacher = (by_title.get(name) for name in ("student before", "student after", "teacher"))
    tiles = [_accuracy_tile(curves, before, after, teacher), _gap_tile(before, after, teacher)]
    tiles += [_kl_tile(curves, before, after)]
    if not rows:
        loss = curves.last_value(None, "loss")
        tiles.append(None if loss is None else Tile(label="Loss", value=f"{loss:.4g}", detail="at the last step"))
    seconds = summary.get("seconds")
    if isinstance(seconds, (int, float)) and math.isfinite(seconds):
        tiles.append(Tile(label="Wall clock", value=duration(seconds), detail=_count(steps, "training step")))
    elif steps:
        tiles.append(Tile(label="Training steps", value=f"{steps:,}"))
    return [tile for tile in tiles if tile is not None]


def _accuracy_tile(
    curves: Curves, before: SummaryRow | None, after: SummaryRow | None, teacher: SummaryRow | None
) -> Tile | None:
    value, detail = curves.last_value("student", "accuracy"), "at the last evaluation"
    if after is not None and after.accuracy is not None:
        others = (("from", before), ("teacher", teacher))
        known = [f"{word} {row.accuracy:.1%}" for word, row in others if row and row.accuracy is not None]
        value, detail = after.accuracy, " · ".join(known)
    return None if value is None else Tile(label="Held-out accuracy", value=f"{value:.1%}", detail=detail)


def _gap_tile(before: SummaryRow | None, after: SummaryRow | None, teacher: SummaryRow | None) -> Tile | None:
    start, end, goal = (row.accuracy if row else None for row in (before, after, teacher))
    if start is None or end is None or goal is None or goal <= start:
        return None
    share = (end - start) / (goal - start)
    return Tile(label="Gap to the teacher closed", value=f"{share:.0%}", detail=f"{100 * (end - start):+.1f} points")


def _kl_tile(curves: Curves, before: SummaryRow | None, after: SummaryRow | None) -> Tile | None:
    value, detail = curves.last_value(None, "reverse_kl"), "nats · at the last step"
    if after is not None and after.reverse_kl is not None:
        start = before.reverse_kl if before else None
        value, detail = after.reverse_kl, "nats per token" if start is None else f"nats · from {start:.3g}"
    return None if value is None else Tile(label="Reverse KL to the teacher", value=f"{value:.3g}", detail=detail)


def _notices(
    metrics: Sequence[MetricsRecord], samples: Sequence[SampleRecord], rows: Sequence[SummaryRow]
) -> list[str]:
    if not metrics and not samples and not rows:
        return ["This run has recorded nothing yet. Write the report again after its first step."]
    notices = []
    if not any(record.kind == "step" for record in metrics):
        notices.append("No training step is recorded yet.")
    if not any(record.kind == "eval" for record in metrics):
        notices.append("This run has no evaluations, so there is no held-out curve.")
    if not rows:
        notices.append(f"This run has no {SUMMARY_FILE} yet; it is written when training ends.")
    if not samples:
        notices.append("No responses were recorded.")
    return notices


def _changes(history: Sequence[tuple[int, Mapping[str, Any]]]) -> list[str]:
    """A sentence about the changed settings of every resumption; a moved run folder does not count."""
    notes: list[str] = []
    for step, changed in history:
        values = [f"{key} {change[0]} → {change[1]}" for key, change in changed.items() if key != "run_dir"]
        notes += [f"From step {step} on: {'; '.join(values)}."] if values else []
    return notes


def _pair_view(pair: SamplePair) -> Mapping[str, Any]:
    prompt = pair.late.prompt
    return {
        "prompt": prompt,
        "answer": pair.late.answer,
        "answers": [_sample_view(sample, prompt) for sample in (pair.early, pair.late) if sample is not None],
        "teacher": None if pair.teacher is None else _sample_view(pair.teacher, prompt),
    }


def _sample_view(sample: SampleRecord, shown_prompt: str) -> Mapping[str, Any]:
    kl = mean_kl(sample)
    facts = [_count(len(sample.tokens), "token")]
    facts += [f"mean KL {kl:.3g} nats"] if kl is not None else []
    facts += [f"reward {sample.reward:g}"] if sample.reward is not None else []
    facts += [] if sample.finished else ["cut at the length limit"]
    author = {"student": "student", "teacher": "teacher", "dataset": "data set"}[sample.source]
    return {
        "title": f"{author}, step {sample.step}",
        "prompt": None if sample.prompt == shown_prompt else sample.prompt,
        "facts": facts,
        "tokens": coloured_tokens(sample),
        "more": max(len(sample.tokens) - MAX_TOKENS_SHOWN, 0),
        "response": sample.response,
    }


def _inline_json(value: Any) -> Markup:
    """JSON for a script element: "<" is escaped, so that no content can close the element."""
    return Markup(json.dumps(strict_json(value), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))


def _asset(name: str) -> str:
    return (ASSETS / name).read_text("utf-8")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"

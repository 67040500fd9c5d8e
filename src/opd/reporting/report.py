"""Run folder → `report.html`, one file that needs no other file and no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opd.errors import RunFolderError
from opd.reporting.about import About, State, read_about, read_state
from opd.reporting.configuration import configuration, parsed
from opd.reporting.files import (
    CONFIG_FILE,
    REPORT_FILE,
    explain_os_errors,
    refuse_other_folders,
    write_atomically,
)
from opd.reporting.guarded import Onset, onset_notes, read_onsets
from opd.reporting.header import header, spelled
from opd.reporting.page import render_page, slug
from opd.reporting.plots import ChartGroup
from opd.reporting.record import MetricsRecord, SampleRecord, comparable, read_history, read_metrics, read_samples
from opd.reporting.sections import axes, chart_groups
from opd.reporting.series import Curves
from opd.reporting.summary import SummaryRow, read_summary, summary_cells, summary_notes, summary_rows
from opd.reporting.viewer import viewer_css, viewer_data, viewer_script


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One headline number."""

    label: str
    value: str
    detail: str = ""


def write_report(
    run_dir: str | Path,
    out: str | Path | None = None,
    title: str | None = None,
    remarks: Sequence[str] | None = None,
) -> Path:
    """Write the report of a run, finished or not, to `out` (default `<run_dir>/report.html`).

    The page names whatever the folder lacks; `remarks` take the place of that for records that are of no run. Raises `RunFolderError` when the folder is no run folder or cannot be written.
    """
    folder = Path(run_dir)
    destination = folder / REPORT_FILE if out is None else Path(out)
    page = report_page(folder, title, remarks=remarks)
    with explain_os_errors("create", destination.parent):
        destination.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(destination, page.encode("utf-8", "replace"))
    return destination


def report_page(
    run_dir: str | Path, title: str | None = None, *, version: str = "", remarks: Sequence[str] | None = None
) -> str:
    """The report of a run as HTML text, which loads itself again while the run goes on. One with a `version` is served: it asks /version
    for news. Raises `RunFolderError` when the folder is no run folder."""
    folder = Path(run_dir)
    _refuse_other_folders(folder)
    return render_report(
        title=title or folder.resolve().name,
        metrics=read_metrics(folder),
        samples=read_samples(folder),
        summary=read_summary(folder),
        config=_read_config(folder),
        history=read_history(folder),
        about=read_about(folder),
        state=read_state(folder),
        onsets=read_onsets(folder),
        version=version,
        remarks=remarks,
    )


def render_report(
    *,
    title: str,
    metrics: Sequence[MetricsRecord],
    samples: Sequence[SampleRecord] = (),
    summary: Mapping[str, Any] | None = None,
    config: str | None = None,
    history: Sequence[tuple[int, Mapping[str, Any]]] = (),
    about: About | None = None,
    state: State | None = None,
    onsets: Sequence[Onset] = (),
    version: str = "",
    remarks: Sequence[str] | None = None,
) -> str:
    """The page as HTML text."""
    rows = summary_rows(summary or {})
    metrics = comparable(metrics)
    curves = Curves(metrics)
    groups = chart_groups(curves, rows)
    column_titles, cells = summary_cells(rows)
    found = [*onset_notes(onsets), *summary_notes(summary or {})]
    told = _notices(metrics, samples, rows, state) if remarks is None else remarks
    steps, saved = sum(record.kind == "step" for record in metrics), parsed(config or "")
    context = {
        "title": title,
        "header": header(about, state, saved),
        "state": None if state is None else {**asdict(state), "alive": state.alive},
        "subtitle": _subtitle(curves, metrics, None if state or remarks is not None else steps),
        "tiles": _tiles(curves, rows, summary or {}, steps),
        "column_titles": column_titles,
        "rows": cells,
        "dotted": [row for row in rows if row.accuracy is not None],
        "groups": groups,
        "axes": [asdict(axis) for axis in axes(curves)],
        "notices": list(dict.fromkeys([*told, *found, *_changes(history)])),
        "config": configuration(config, saved) if config else None,
        "live": bool(version) or (state is not None and state.name in ("loading", "running") and state.alive),
        "version": version,
        "viewer": viewer_data(samples),
        "viewer_css": viewer_css(),
        "viewer_script": viewer_script(),
    }
    connect = "'self'" if version else "'none'"
    return render_page("report.html.jinja", {**context, "contents": _contents(context)}, connect=connect)


def _contents(context: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(id, title) of every section, in the order of the page."""
    groups: Sequence[ChartGroup] = context["groups"]
    opened, collapsed = (
        [(slug(group.title), group.title) for group in groups if group.collapsed is closed] for closed in (False, True)
    )
    return [
        *([("result", "Result")] if context["rows"] else []),
        *opened,
        *([("token-by-token", "Token by token")] if context["viewer"] else []),
        *collapsed,
        *([("configuration", "Configuration")] if context["config"] else []),
    ]


def _refuse_other_folders(folder: Path) -> None:
    if not folder.is_dir():
        raise RunFolderError(f"There is no folder {folder}. Give the folder that training wrote its run to.")
    refuse_other_folders(folder, begun=False)


def _read_config(folder: Path) -> str | None:
    path = folder / CONFIG_FILE
    with explain_os_errors("read", path):
        return path.read_text("utf-8", errors="replace") if path.exists() else None


def _subtitle(curves: Curves, metrics: Sequence[MetricsRecord], steps: int | None) -> str:
    """`steps` is None where the state of the run says them."""
    if not metrics:
        return ""
    first, last = curves.first, curves.last
    evaluations = len({record.step for record in metrics if record.kind == "eval"})
    words = [f"steps {first:,} to {last:,}" if last > first else f"step {first}"]
    words = [] if steps is None else [_count(steps, "training step"), *words]
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
        tiles.append(Tile(label="Wall clock", value=spelled(seconds), detail=_count(steps, "training step")))
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
    metrics: Sequence[MetricsRecord], samples: Sequence[SampleRecord], rows: Sequence[SummaryRow], state: State | None
) -> list[str]:
    if not metrics and not samples and not rows:
        return ["This run has recorded nothing yet. Write the report again after its first step."]
    notices = []
    if not any(record.kind == "step" for record in metrics):
        notices.append("No training step is recorded yet.")
    if not any(record.kind == "eval" for record in metrics):
        notices.append("This run has no evaluations, so there is no held-out curve.")
    if not rows and state is None:
        notices.append("This run has not ended, or it ended without a result.")
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


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"

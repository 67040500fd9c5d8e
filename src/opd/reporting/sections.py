"""Which charts a report has, section by section: every recorded metric exactly once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from opd.reporting.panels import (
    AT_THE_ENDS,
    ENDS_NOTE,
    GROUPS,
    KL_BY_POSITION_PREFIX,
    LOSS,
    NEUTRAL,
    PERCENT_METRICS,
    PHASE_COLORS,
    REVERSE_KL,
    SOURCE_COLORS,
    START_KL,
    STEP_TIME,
    STUDENT,
    TEACHER,
    TOKENS,
    TOKENS_PER_SECOND,
    Curve,
    Dash,
    Panel,
)
from opd.reporting.plots import BARS_UP_TO, Chart, ChartGroup, Line, chart_of, curve_line, panel_chart
from opd.reporting.record import WALL_CLOCK_PREFIX
from opd.reporting.series import MAX_POINTS, Curves, Series, mean, rounded, thinned
from opd.reporting.summary import SummaryRow

POSITION_WINDOW = 10  # the first and the last tenth of the run are compared by response position
SAME_LOSS = 1e-4  # relative; a loss is summed in float32
MINUTE, HOUR = 60.0, 3600.0


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A quantity that the charts over the run may have as their x axis, in place of the step."""

    name: str
    """Of the choice, in two or three words."""
    label: str
    """Below the axis."""
    unit: str
    steps: Sequence[float]
    values: Sequence[float | None]
    """At each of `steps`; before the update of that number."""


def chart_groups(curves: Curves, summary: Sequence[SummaryRow] = ()) -> list[ChartGroup]:
    """Every recorded metric exactly once: known ones in their panels, per-source and unknown ones after them."""
    teacher = next((row for row in summary if row.title == "teacher"), None)
    groups: list[ChartGroup] = []
    for group in GROUPS:
        panels = _without_second_loss(group.panels, curves)
        charts = [chart for panel in panels if (chart := panel_chart(panel, curves, teacher))]
        if group.title == "Responses":
            charts += _kl_by_position(curves)
        if group.title == "Optimizer and machine":
            charts = _time_per_phase(curves) + charts
        groups.append(ChartGroup(title=group.title, charts=tuple(charts)))
    groups.append(ChartGroup(title="By source", charts=tuple(_by_source(curves)), collapsed=True))
    groups.append(ChartGroup(title="Other metrics", charts=tuple(_others(curves)), collapsed=True))
    return [group for group in groups if group.charts]


def axes(curves: Curves) -> list[Axis]:
    """What the run recorded of: the root of the KL to the student's start, tokens seen, and time.

    Early in training accuracy grows about linearly with √KL to the start (arXiv 2609.32722).
    """
    found: list[Axis] = []
    start = curves.get(None, START_KL) or curves.get("student", START_KL)
    if start is not None:
        root = [math.sqrt(value) if value >= 0 else math.nan for value in start.values]
        label = "√KL to the student's start (√nats)"
        found.append(_axis("√KL to the start", label, "√nats", start.steps, root))
    if (tokens := curves.get(None, TOKENS)) is not None:
        found.append(_summed(tokens, "tokens seen", "rollout tokens seen", "tokens"))
    if (seconds := curves.get(None, STEP_TIME)) is not None:
        whole = sum(value for value in seconds.values if math.isfinite(value))
        unit, size = next(
            ((unit, size) for unit, size in (("hours", HOUR), ("minutes", MINUTE)) if whole >= 2 * size), ("seconds", 1)
        )
        found.append(_summed(seconds, "training time", f"{unit} of training, without evaluations", unit, size))
    return found


def _summed(series: Series, name: str, label: str, unit: str, size: float = 1.0) -> Axis:
    """The sum of a metric over the updates before each step, in units of `size`."""
    total, sums = 0.0, [0.0]
    for value in series.values:
        total += value / size if math.isfinite(value) else 0.0
        sums.append(total)
    return _axis(name, label, unit, [*series.steps, series.steps[-1] + 1], sums)


def _axis(name: str, label: str, unit: str, steps: Sequence[float], values: Sequence[float]) -> Axis:
    """Few enough of the values, the first and the last among them; the page interpolates."""
    apart = math.ceil(len(steps) / MAX_POINTS)
    kept = sorted({*range(0, len(steps), apart), len(steps) - 1})
    few = rounded(values[index] for index in kept)
    return Axis(name=name, label=label, unit=unit, steps=[steps[index] for index in kept], values=few)


def _without_second_loss(panels: Sequence[Panel], curves: Curves) -> list[Panel]:
    """The panels without the loss where it is the reverse KL at every step, which the chart of the divergence then says."""
    loss, reverse_kl = curves.get(None, LOSS), curves.get(None, REVERSE_KL)
    if loss is None or reverse_kl is None or list(loss.steps) != list(reverse_kl.steps):
        return list(panels)
    pairs = zip(loss.values, reverse_kl.values, strict=True)
    if not all(
        math.isclose(a, b, rel_tol=SAME_LOSS, abs_tol=1e-9) or (math.isnan(a) and math.isnan(b)) for a, b in pairs
    ):
        return list(panels)
    kept = []
    for panel in panels:
        metrics = [curve.metric for curve in panel.curves]
        if REVERSE_KL in metrics:
            kept.append(replace(panel, note=f"{panel.note} The loss is this reverse KL, and has no chart of its own."))
        elif metrics != [LOSS]:
            kept.append(panel)
    return kept


def _time_per_phase(curves: Curves) -> list[Chart]:
    names = [name for name in curves.names(None) if name.startswith(WALL_CLOCK_PREFIX)]
    phases = {
        name.removeprefix(WALL_CLOCK_PREFIX): series
        for name in names
        if name not in (STEP_TIME, TOKENS_PER_SECOND) and (series := curves.get(None, name))
    }
    whole = curves.get(None, STEP_TIME)
    if not phases and whole is None:
        return []
    seconds = dict(phases)
    if whole is not None:
        rest = _rest_of_step(whole, list(phases.values()))
        if not phases or sum(rest.values) > 0.01 * sum(whole.values):
            seconds["rest of the step" if phases else "step"] = rest
    lines: list[Line] = []
    for index, (name, series) in enumerate(seconds.items()):
        points = thinned(series)
        kind = "bars" if len(points.steps) <= BARS_UP_TO else "stack"
        color = PHASE_COLORS[index % len(PHASE_COLORS)]
        lines.append(Line(label=name, color=color, kind=kind, x=points.steps, y=rounded(points.values)))
    if whole is not None and (slowest := thinned(whole)).extremes is not None:
        # Means of bins hide one slow step.
        lines.append(curve_line(Curve(metric=STEP_TIME, label="whole step", color=NEUTRAL), slowest))
    return [chart_of(Chart(title="Time per step", note="By phase.", unit="s", zero=True, lines=lines))]


def _rest_of_step(whole: Series, phases: Sequence[Series]) -> Series:
    spent = dict.fromkeys(whole.steps, 0.0)
    for series in phases:
        for step, value in zip(series.steps, series.values, strict=True):
            spent[step] = spent.get(step, 0.0) + value
    rest = [max(value - spent[step], 0.0) for step, value in zip(whole.steps, whole.values, strict=True)]
    return Series(steps=whole.steps, values=rest, intervals=[None] * len(rest))


def _kl_by_position(curves: Curves) -> list[Chart]:
    """Reverse KL along the response: the first tenth of the run against the last."""
    positions: dict[float, Series] = {}
    for name in curves.names(None):
        if name.startswith(KL_BY_POSITION_PREFIX):
            try:
                position = float(name.removeprefix(KL_BY_POSITION_PREFIX))
            except ValueError:
                continue
            positions[position] = curves.get(None, name) or Series(steps=(), values=(), intervals=())
    if not positions:
        return []
    longest = max(len(series.steps) for series in positions.values())
    window = max(1, longest // POSITION_WINDOW)
    ends: list[tuple[str, str, Dash, slice]] = [("last steps", STUDENT, "solid", slice(-window, None))]
    if longest > 1:
        ends.insert(0, ("first steps", NEUTRAL, "dash", slice(0, window)))
    lines: list[Line] = []
    for label, color, dash, part in ends:
        means = {position: mean(series.values[part]) for position, series in sorted(positions.items())}
        points = Series(steps=list(means), values=list(means.values()), intervals=[None] * len(means))
        curve = Curve(metric="", label=label if longest > 1 else "reverse KL", color=color, dash=dash, who="student")
        lines.append(curve_line(curve, points))
    note = "Per token. A rise to the right means that long responses drift away from the teacher."
    chart = Chart(
        title="Reverse KL by position",
        note=note,
        x_label="position in the response",
        unit="nats",
        zero=True,
        lines=lines,
    )
    return [chart_of(chart)]


def _by_source(curves: Curves) -> Iterable[Chart]:
    names = curves.names(None)
    bare = dict.fromkeys(name.removeprefix(p) for p in SOURCE_COLORS for name in names if name.startswith(p))
    for metric in bare:
        lines = tuple(
            Curve(metric=prefix + metric, label=prefix.rstrip("/").replace("_", "-"), color=color)
            for prefix, color in SOURCE_COLORS.items()
        )
        panel = Panel(title=metric, note="", curves=lines, percent=metric in PERCENT_METRICS)
        if chart := panel_chart(panel, curves):
            yield chart


def _others(curves: Curves) -> Iterable[Chart]:
    drawn = {(curve.who, curve.metric) for group in GROUPS for panel in group.panels for curve in panel.curves}
    levels = {panel.teacher_level for group in GROUPS for panel in group.panels}
    for who in (None, "student", "teacher"):
        for name in curves.names(who):
            if (who, name) in drawn or (who == "teacher" and name in levels) or (who is None and _is_grouped(name)):
                continue
            color = TEACHER if who == "teacher" else STUDENT
            title = name if who is None else f"{name}, held out, {who}"
            ends = who is not None and name.startswith(AT_THE_ENDS)
            curve = Curve(metric=name, label="training" if who is None else who, color=color, who=who, ends=ends)
            series = curves.get(who, name)
            note = ENDS_NOTE if ends and series is not None and len(series.values) > 1 else ""
            if chart := panel_chart(Panel(title=title, note=note, curves=(curve,), percent=ends), curves):
                yield chart


def _is_grouped(name: str) -> bool:
    """True for the training metrics that the time, position and source charts draw."""
    if name.startswith(KL_BY_POSITION_PREFIX):
        suffix = name.removeprefix(KL_BY_POSITION_PREFIX)
        return suffix.replace(".", "", 1).isdigit()
    return name.startswith((WALL_CLOCK_PREFIX, *SOURCE_COLORS))

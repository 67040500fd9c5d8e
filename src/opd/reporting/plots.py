"""Metrics → plotly figures as plain JSON. Colours are CSS variables such as "var(--student)", which the page resolves."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from opd.reporting.panels import (
    AT_THE_ENDS,
    ENDS_NOTE,
    GROUPS,
    KL_BY_POSITION_PREFIX,
    NEUTRAL,
    PERCENT_METRICS,
    PHASE_COLORS,
    SOURCE_COLORS,
    STEP_TIME,
    STUDENT,
    TEACHER,
    TOKENS_PER_SECOND,
    Curve,
    Dash,
    Panel,
)
from opd.reporting.record import WALL_CLOCK_PREFIX
from opd.reporting.series import Curves, Series, decades, mean, rounded, smoothed, spans_decades, thinned
from opd.reporting.summary import Interval, SummaryRow

Json = dict[str, Any]

SMOOTH_FROM = 60  # points; below, the eye smooths well enough
MARKERS_UP_TO = 40
BARS_UP_TO = 60
FEW_STEPS = 8
EXPONENT_BELOW = 1e-3  # smaller values read better as 2e−6
LABELLED_DECADES = 2.5  # below, a logarithmic axis also names 2 and 5
POSITION_WINDOW = 10  # the first and the last tenth of the run are compared by response position
PERCENT_AXIS: Json = {"tickformat": "~%", "autorangeoptions": {"clipmin": 0, "clipmax": 1.02}}
NUMBER_AXIS: Json = {"exponentformat": "e", "minexponent": 5, "separatethousands": True}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure, its title and its note."""

    title: str
    note: str
    figure: Json


@dataclass(frozen=True, kw_only=True)
class ChartGroup:
    title: str
    charts: tuple[Chart, ...]
    collapsed: bool = False


def chart_groups(curves: Curves, summary: Sequence[SummaryRow] = ()) -> list[ChartGroup]:
    """Every recorded metric exactly once: known ones in their panels, per-source and unknown ones after them."""
    teacher = next((row for row in summary if row.title == "teacher"), None)
    groups: list[ChartGroup] = []
    for group in GROUPS:
        charts = [chart for panel in group.panels if (chart := _panel_chart(panel, curves, teacher))]
        if group.title == "Responses":
            charts += _kl_by_position(curves)
        if group.title == "Optimizer and machine":
            charts = _time_per_phase(curves) + charts
        groups.append(ChartGroup(title=group.title, charts=tuple(charts)))
    groups.append(ChartGroup(title="By source", charts=tuple(_by_source(curves)), collapsed=True))
    groups.append(ChartGroup(title="Other metrics", charts=tuple(_others(curves)), collapsed=True))
    return [group for group in groups if group.charts]


def summary_figure(rows: Sequence[SummaryRow]) -> Json | None:
    """Accuracy of each row as a dot with its interval."""
    shown = [row for row in rows if row.accuracy is not None]
    if len(shown) < 2:
        return None
    traces: list[Json] = []
    for row in reversed(shown):
        accuracy = row.accuracy or 0.0
        low, high = row.accuracy_interval or (accuracy, accuracy)
        color = _var(TEACHER if row.title == "teacher" else STUDENT if row.title == "student after" else NEUTRAL)
        hover = f"{row.label}: {accuracy:.1%} [{low:.1%}, {high:.1%}]<extra></extra>"
        bars = _error_bars([high - accuracy], [accuracy - low], color, thickness=2, width=5)
        trace = _scatter([accuracy], [row.label], mode="markers", marker={"size": 13, "color": color}, error_x=bars)
        traces.append(trace | {"hovertemplate": hover, "showlegend": False})
    layout = _layout(percent=False, legend=False)
    layout["xaxis"] |= {"title": None, "tickformat": ".0%"}
    layout["yaxis"] |= {"showgrid": False, "fixedrange": True}
    layout |= {"hovermode": "closest", "height": 190, "margin": {"l": 10, "r": 20, "t": 10, "b": 30}}
    return {"data": traces, "layout": layout}


def _panel_chart(panel: Panel, curves: Curves, teacher: SummaryRow | None = None) -> Chart | None:
    drawn = [(curve, series) for curve in panel.curves if (series := curves.get(curve.who, curve.metric))]
    teacher_was_evaluated = panel.teacher_level is not None and curves.get("teacher", panel.teacher_level)
    if not drawn and not teacher_was_evaluated:
        return None
    traces = _teacher_level(panel, curves, teacher) if panel.teacher_level else []
    for curve, series in drawn:
        traces += _curve_traces(curve, series, percent=panel.percent)
    values = [value for _, series in drawn for value in series.values]
    is_log = panel.log and spans_decades(values)
    layout = _layout(percent=panel.percent, legend=sum(trace["showlegend"] for trace in traces) > 1)
    layout["xaxis"] |= _whole_steps(curves)
    if is_log:
        dtick = "D2" if decades(values) < LABELLED_DECADES else 1
        layout["yaxis"] |= {"type": "log", "dtick": dtick, "tickformat": "~g"}
    elif panel.from_zero and all(value >= 0 for value in values if math.isfinite(value)):
        layout["yaxis"]["rangemode"] = "tozero"
    if 0 < max((abs(value) for value in values if math.isfinite(value)), default=0) < EXPONENT_BELOW:
        layout["yaxis"]["tickformat"] = "~e"
    note = f"{panel.note} Logarithmic axis.".strip() if is_log else panel.note
    return Chart(title=panel.title, note=note, figure={"data": traces, "layout": layout})


def _curve_traces(curve: Curve, series: Series, *, percent: bool) -> list[Json]:
    number = ".1%" if percent else ".4~g"
    if curve.ends:
        return [_diamonds(curve, series, number)]
    points = thinned(series)
    line: Json = {"color": _var(curve.color), "width": 2, "dash": curve.dash}
    trace = _scatter(
        points.steps,
        rounded(points.values),
        name=curve.label,
        mode="lines+markers" if curve.who or len(points.steps) <= MARKERS_UP_TO else "lines",
        line=line,
        marker={"size": 6, "color": _var(curve.color)},
        hovertemplate=f"%{{y:{number}}}",
    )
    if any(points.intervals):
        trace |= _interval_hover((interval or (math.nan, math.nan) for interval in points.intervals), number)
        return [*_band(points, curve.color), trace]
    if curve.who is None and len(points.steps) >= SMOOTH_FROM:
        # The recorded values stay visible behind their moving average, and are what the hover shows.
        faint = {**trace, "line": {**line, "width": 1}, "opacity": 0.35, "showlegend": False}
        smooth = {**trace, "y": rounded(smoothed(points.values)), "hoverinfo": "skip"}
        del smooth["hovertemplate"]
        return [faint, smooth]
    return [trace]


def _diamonds(curve: Curve, series: Series, number: str) -> Json:
    """Values measured at the ends of a run alone, with their intervals; a line between them would be made up."""
    color = _var(curve.color)
    marker: Json = {"size": 9, "symbol": "diamond", "color": color}
    trace = _scatter(series.steps, rounded(series.values), name=curve.label, mode="markers", marker=marker)
    if not any(series.intervals):
        return trace | {"hovertemplate": f"%{{y:{number}}}"}
    bounds = [interval or (value, value) for interval, value in zip(series.intervals, series.values, strict=True)]
    above = rounded(high - value for (_, high), value in zip(bounds, series.values, strict=True))
    below = rounded(value - low for (low, _), value in zip(bounds, series.values, strict=True))
    bars = _error_bars(above, below, color, thickness=1.5, width=4)
    return trace | _interval_hover(bounds, number) | {"error_y": bars}


def _interval_hover(bounds: Iterable[Interval], number: str) -> Json:
    template = f"%{{y:{number}}} [%{{customdata[0]:{number}}}, %{{customdata[1]:{number}}}]"
    return {"customdata": [rounded(pair) for pair in bounds], "hovertemplate": template}


def _error_bars(
    above: Sequence[float | None], below: Sequence[float | None], color: str, *, thickness: float, width: int
) -> Json:
    bars: Json = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
    return bars | {"thickness": thickness, "width": width, "color": color}


def _band(series: Series, color: str) -> list[Json]:
    bounds = [(step, *pair) for step, pair in zip(series.steps, series.intervals, strict=True) if pair]
    bounds = [(step, low, high) for step, low, high in bounds if math.isfinite(low) and math.isfinite(high)]
    if len(bounds) < 2:
        return []
    x = [step for step, _, _ in bounds]
    low, high = [low for _, low, _ in bounds], [high for _, _, high in bounds]
    return [_area([*x, *reversed(x)], [*high, *reversed(low)], color)]


def _area(x: Sequence[float], y: Sequence[float], color: str) -> Json:
    fill = _var(f"{color}-band")
    trace = _scatter(x, rounded(y), mode="lines", fill="toself", fillcolor=fill, line={"width": 0, "color": fill})
    return trace | {"hoverinfo": "skip", "showlegend": False}


def _teacher_level(panel: Panel, curves: Curves, teacher: SummaryRow | None) -> list[Json]:
    series = curves.get("teacher", panel.teacher_level or "")
    if series is not None:
        level, interval = series.values[-1], series.intervals[-1]
    elif panel.teacher_level == "accuracy" and teacher is not None and teacher.accuracy is not None:
        level, interval = teacher.accuracy, teacher.accuracy_interval
    else:
        return []
    x = [curves.first, max(curves.last, curves.first + 1)]
    line = _scatter(
        x,
        rounded([level, level]),
        name="teacher" if teacher is None else teacher.label,
        mode="lines",
        line={"color": _var(TEACHER), "width": 2},
        hovertemplate="%{y:.1%}" if panel.percent else "%{y:.4~g}",
    )
    if interval is None or not all(map(math.isfinite, interval)):
        return [line]
    low, high = interval
    return [_area([*x, *reversed(x)], [high, high, low, low], TEACHER), line]


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
    traces: list[Json] = []
    for index, (name, series) in enumerate(seconds.items()):
        points = thinned(series)
        color = _var(PHASE_COLORS[index % len(PHASE_COLORS)])
        trace: Json = {"name": html.escape(name), "x": points.steps, "y": rounded(points.values)}
        if len(points.steps) <= BARS_UP_TO:
            trace |= {"type": "bar", "marker": {"color": color, "line": {"width": 0}}}
        else:
            trace |= {"type": "scatter", "mode": "lines", "stackgroup": "phases", "fillcolor": color}
            trace["line"] = {"width": 0.5, "color": color}
        traces.append(trace | {"hovertemplate": "%{y:.3~g} s", "showlegend": True})
    layout = _layout(percent=False, legend=True) | {"barmode": "stack", "bargap": 0.15}
    layout["xaxis"] |= _whole_steps(curves)
    return [Chart(title="Time per step", note="Seconds, by phase.", figure={"data": traces, "layout": layout})]


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
    traces: list[Json] = []
    for label, color, dash, part in ends:
        means = {position: mean(series.values[part]) for position, series in sorted(positions.items())}
        points = Series(steps=list(means), values=list(means.values()), intervals=[None] * len(means))
        curve = Curve(metric="", label=label if longest > 1 else "reverse KL", color=color, dash=dash, who="student")
        traces += _curve_traces(curve, points, percent=False)
    layout = _layout(percent=False, legend=len(traces) > 1)
    layout["xaxis"]["title"] = {"text": "position in the response", "standoff": 4, "font": {"size": 11}}
    layout["yaxis"]["rangemode"] = "tozero"
    note = "Nats per token. A rise to the right means that long responses drift away from the teacher."
    return [Chart(title="Reverse KL by position", note=note, figure={"data": traces, "layout": layout})]


def _by_source(curves: Curves) -> Iterable[Chart]:
    names = curves.names(None)
    bare = dict.fromkeys(name.removeprefix(p) for p in SOURCE_COLORS for name in names if name.startswith(p))
    for metric in bare:
        lines = tuple(
            Curve(metric=prefix + metric, label=prefix.rstrip("/").replace("_", "-"), color=color)
            for prefix, color in SOURCE_COLORS.items()
        )
        panel = Panel(title=metric, note="", curves=lines, percent=metric in PERCENT_METRICS)
        if chart := _panel_chart(panel, curves):
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
            note = ENDS_NOTE if ends else ""
            if chart := _panel_chart(Panel(title=title, note=note, curves=(curve,), percent=ends), curves):
                yield chart


def _is_grouped(name: str) -> bool:
    """True for the training metrics that the time, position and source charts draw."""
    if name.startswith(KL_BY_POSITION_PREFIX):
        suffix = name.removeprefix(KL_BY_POSITION_PREFIX)
        return suffix.replace(".", "", 1).isdigit()
    return name.startswith((WALL_CLOCK_PREFIX, *SOURCE_COLORS))


def _scatter(x: Sequence[float], y: Sequence[float | str | None], **options: Any) -> Json:
    return {"type": "scatter", "x": x, "y": y, "showlegend": True, **options}


def _layout(*, percent: bool, legend: bool) -> Json:
    axis: Json = {
        "gridcolor": _var("grid"),
        "linecolor": _var("grid"),
        "zerolinecolor": _var("grid"),
        "tickfont": {"size": 11},
        "automargin": True,
        "nticks": 6,
    }
    return {
        "height": 250,
        "margin": {"l": 8, "r": 12, "t": 8, "b": 36},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": _var("muted")},
        "hovermode": "x unified",
        "hoverlabel": {"bgcolor": _var("card"), "bordercolor": _var("grid"), "font": {"color": _var("ink")}},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": _var("muted"), "activecolor": _var("ink")},
        "showlegend": legend,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 11}},
        "xaxis": {
            **axis,
            "title": {"text": "step", "standoff": 4, "font": {"size": 11}},
            "showgrid": False,
            "showline": True,
        },
        "yaxis": {**axis, **(PERCENT_AXIS if percent else NUMBER_AXIS), "showline": False},
    }


def _whole_steps(curves: Curves) -> Json:
    """Ticks at whole steps for a short run, where plotly would put some between them."""
    if curves.last - curves.first > FEW_STEPS:
        return {}
    return {"tickvals": list(range(curves.first, curves.last + 1))}


def _var(name: str) -> str:
    return f"var(--{name})"

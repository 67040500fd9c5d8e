"""Charts as plain data, which assets/charts.js draws as inline SVG.

Our own small script draws them, and no chart library: a page stays under 1.5 MB (plotly alone is 4.8 MB), style sheets decide themes and
print, and a screen reader and a test can read what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from opd.reporting.panels import TEACHER, Curve, Dash, Panel
from opd.reporting.series import (
    EXTREME_DIGITS,
    Curves,
    Series,
    rounded,
    spans_decades,
    thinned,
)
from opd.reporting.summary import Interval, SummaryRow

Kind = Literal["line", "points", "level", "stack", "bars"]
Numbers = list[float | None]

STEP = "step"
"""The `x_label` of charts over the run. They have one range and one cursor, and the page may show another quantity in place of steps."""
SMOOTH_FROM = 60  # points; below, the eye smooths well enough
BARS_UP_TO = 60


@dataclass(frozen=True, kw_only=True)
class Line:
    """One quantity in a chart; every list runs along `x`, and None is a gap."""

    label: str
    color: str | int = "student"
    """Name of a CSS variable, or the number of a colour of the palette (`opd compare`)."""
    dash: Dash = "solid"
    kind: Kind = "line"
    """points: values that no line joins. level: one height across the chart. stack and bars: added on top of the lines before."""
    x: Sequence[float]
    y: Sequence[float | None]
    low: Numbers | None = None
    """With `high`: confidence interval, drawn as a band, or as bars at points."""
    high: Numbers | None = None
    min: Numbers | None = None
    """With `max`: smallest and largest value of each bin, where `y` are means of bins. Drawn as a faint band."""
    max: Numbers | None = None
    smooth: bool = False
    """Draw a running median in front, and the values faintly behind it."""
    marks: bool = False
    """Draw a mark at every value."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """One number that stands where a chart would show nothing."""

    label: str
    text: str
    said: str
    """How often, and when, it was measured."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart, or, where nothing changes over the run, its `values` in place of `lines`."""

    title: str
    note: str = ""
    x_label: str = STEP
    unit: str = ""
    percent: bool = False
    """Values are shares in [0, 1]."""
    log: bool = False
    zero: bool = False
    """The y axis begins at 0."""
    lines: Sequence[Line] = ()
    values: Sequence[Value] = ()

    def to_json(self) -> dict[str, Any]:
        """What charts.js reads; fields as above, without `values`."""
        drawn = asdict(self)
        del drawn["values"]
        return drawn


@dataclass(frozen=True, kw_only=True)
class ChartGroup:
    """A section of charts."""

    title: str
    charts: Sequence[Chart]
    collapsed: bool = False


def chart_of(chart: Chart) -> Chart:
    """The chart, or its values where every line stays at one height: no axis is drawn around nothing."""
    if any(_changes(line) for line in chart.lines):
        return chart
    values = [_value(line, chart) for line in chart.lines]
    return Chart(title=chart.title, note=chart.note, unit=chart.unit, percent=chart.percent, values=tuple(values))


def panel_chart(panel: Panel, curves: Curves, teacher: SummaryRow | None = None) -> Chart | None:
    """The chart of a panel; None where nothing of it was recorded."""
    drawn = [(curve, series) for curve in panel.curves if (series := curves.get(curve.who, curve.metric))]
    level = teacher_level(panel, curves, teacher)
    teacher_was_evaluated = panel.teacher_level is not None and curves.get("teacher", panel.teacher_level)
    if not drawn and not teacher_was_evaluated:
        return None
    values = [value for _, series in drawn for value in series.values]
    known = [value for value in values if math.isfinite(value)]
    log = panel.log and spans_decades(known)
    lost = len(values) - len(known)
    notes = [
        panel.note,
        *(curve.note for curve, _ in drawn),
        "Logarithmic axis." if log else "",
        _lost(lost) if lost else "",
    ]
    chart = Chart(
        title=panel.title,
        note=" ".join(filter(None, notes)),
        unit=panel.unit,
        percent=panel.percent,
        log=log,
        zero=panel.from_zero and all(value >= 0 for value in known),
        lines=([level] if level else []) + [curve_line(curve, series, smooth=panel.smooth) for curve, series in drawn],
    )
    return chart_of(chart)


def curve_line(curve: Curve, series: Series, *, smooth: bool = True) -> Line:
    """A metric over the run: training values as a line, evaluations with marks and intervals."""
    points = thinned(series)
    many = len(points.steps) >= SMOOTH_FROM
    return Line(
        label=curve.label,
        color=curve.color,
        dash=curve.dash,
        kind="points" if curve.ends else "line",
        x=points.steps,
        y=rounded(points.values),
        smooth=smooth and many and curve.who is None,
        marks=curve.who is not None,
        **bounds(points),
    )


def teacher_level(panel: Panel, curves: Curves, teacher: SummaryRow | None) -> Line | None:
    """The teacher's value across the chart: its last evaluation, or for accuracy what the summary says."""
    series = curves.get("teacher", panel.teacher_level) if panel.teacher_level else None
    if series is not None:
        level, interval = series.values[-1], series.intervals[-1]
    elif panel.teacher_level == "accuracy" and teacher is not None and teacher.accuracy is not None:
        level, interval = teacher.accuracy, teacher.accuracy_interval
    else:
        return None
    steps = [curves.first, max(curves.last, curves.first + 1)]
    ends = Series(steps=steps, values=[level, level], intervals=[interval, interval])
    label = "teacher" if teacher is None else teacher.label
    return Line(label=label, color=TEACHER, kind="level", x=steps, y=rounded(ends.values), **bounds(ends))


def spoken(value: float, *, percent: bool = False, unit: str = "") -> str:
    """A value as text: 97.7%, 0.0123 nats, 12,345 tokens."""
    if percent:
        return f"{value:.1%}"
    large = abs(value) >= 1000
    text = f"{value:,.0f}" if large else f"{value:.4g}"
    return f"{text} {unit}" if unit else text


def _changes(line: Line) -> bool:
    # The means of bins can be equal where the values in them are not.
    heights = {height for heights in (line.y, line.min or (), line.max or ()) for height in heights}
    return len(heights - {None}) > 1


def bounds(series: Series) -> dict[str, Any]:
    """`low` and `high`, `min` and `max` of a line, where the series has them."""
    found: dict[str, Any] = {}
    if any(series.intervals):
        pairs: list[Interval] = [interval or (math.nan, math.nan) for interval in series.intervals]
        found |= {"low": rounded(low for low, _ in pairs), "high": rounded(high for _, high in pairs)}
    if series.extremes is not None:
        found["min"] = rounded((low for low, _ in series.extremes), EXTREME_DIGITS)
        found["max"] = rounded((high for _, high in series.extremes), EXTREME_DIGITS)
    return found


def _value(line: Line, chart: Chart) -> Value:
    known = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None]
    if not known:
        return Value(label=line.label, text="—", said="never a finite number")
    (first, value), times = known[0], len(known)
    text = spoken(value, percent=chart.percent, unit=chart.unit)
    if line.low and line.high and line.low[-1] is not None and line.high[-1] is not None:
        ends = (spoken(bound, percent=chart.percent).removesuffix("%") for bound in (line.low[-1], line.high[-1]))
        text += f" [{', '.join(ends)}]"
    if line.kind == "level":
        return Value(label=line.label, text=text, said="")
    every = f"at every {chart.x_label}" if line.min else f"at each of {times:,} {chart.x_label}s"
    where = f"at {chart.x_label} {first:,.0f}" if times == 1 else every
    return Value(label=line.label, text=text, said=where)


def _lost(number: int) -> str:
    return f"{number:,} value{'' if number == 1 else 's'} of the run {'is' if number == 1 else 'are'} not finite."

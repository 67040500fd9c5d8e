"""Curves of compared runs on top of each other: one chart for each metric that at least two runs recorded, one line for each group."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from statistics import fmean, median

from opd.errors import printable
from opd.reporting.differences import differing
from opd.reporting.panels import AT_THE_ENDS, ENDS_NOTE, GROUPS, Curve, Dash, Panel
from opd.reporting.plots import Chart, ChartGroup, Line, bounds, chart_of
from opd.reporting.record import WALL_CLOCK_PREFIX
from opd.reporting.runs import Group, Run
from opd.reporting.series import Series, rounded, spans_decades, thinned

POINTS = 300  # per line
SMOOTH_FROM = 60
CROWD = 4  # lines of which each has its own noise are a grey field; from here on they have
CROWD_POINTS = 100  # longer bins, whose extremes are drawn where they stand out:
STANDS_OUT = 3.0  # times the usual distance between the smallest and the largest value of a bin
LABEL = 26  # characters of a name beside a chart
DASHES: tuple[Dash, ...] = ("solid", "dash", "dot")
COLORS = 8  # of assets/compare.css; the ninth group begins again, dashed
TEACHER = "ink"  # the colours of the runs are taken
OTHERS, TIMES = "Other metrics", "Time"


def chart_groups(groups: Sequence[Group], refused: Collection[str] = ()) -> list[ChartGroup]:
    """Sections as in a run's report; what has no panel there comes last. `refused` are metrics of evaluations that must not be compared."""
    found: list[ChartGroup] = []
    drawn: set[tuple[str | None, str]] = set()
    for section in GROUPS:
        charts = []
        for panel in section.panels:
            for curve in panel.curves:
                drawn.add((curve.who, curve.metric))
                if chart := _chart(groups, panel, curve, refused):
                    charts.append(chart)
        found.append(ChartGroup(title=section.title, charts=tuple(charts)))
    rest: dict[str, list[Chart]] = {TIMES: [], OTHERS: []}
    names = dict.fromkeys(
        (who, n) for g in groups for r in g.runs for who in (None, "student") for n in r.curves.names(who)
    )
    for who, name in names:
        panel, curve = _panel_of(who, name)
        if (who, name) not in drawn and (chart := _chart(groups, panel, curve, refused)):
            rest[TIMES if name.startswith(WALL_CLOCK_PREFIX) else OTHERS].append(chart)
    found += [ChartGroup(title=title, charts=tuple(charts), collapsed=True) for title, charts in rest.items()]
    return [section for section in found if section.charts]


def shorten(name: str, size: int) -> str:
    """The name with its middle left out: names of runs often differ at their ends."""
    half = (size - 1) // 2
    return name if len(name) <= size else f"{name[:half]}…{name[-half:]}"


def group_series(group: Group, curve: Curve) -> Series | None:
    """Of one run its own values and intervals. Of several seeds the mean, with the lowest and the highest of them, at the steps that
    all of them have."""
    known = [series for run in group.runs if (series := run.curves.get(curve.who, curve.metric)) is not None]
    if len(known) < 2:
        return known[0] if known else None
    tables = [dict(zip(series.steps, series.values, strict=True)) for series in known]
    steps = [step for step in known[0].steps if all(step in table for table in tables)]
    rows = [[table[step] for table in tables if math.isfinite(table[step])] for step in steps]
    return Series(
        steps=steps,
        values=[fmean(row) if row else math.nan for row in rows],
        intervals=[(min(row), max(row)) if row else None for row in rows],
    )


def _panel_of(who: str | None, name: str) -> tuple[Panel, Curve]:
    """Of a metric that no panel has."""
    ends = name.startswith(AT_THE_ENDS)
    curve = Curve(metric=name, label="", who="student" if who else None, ends=ends)
    shown = printable(name)
    title = shown.removeprefix(WALL_CLOCK_PREFIX) if who is None else f"{shown}, held out"
    unit = "s" if name.startswith(WALL_CLOCK_PREFIX) else ""
    return Panel(title=title, note=ENDS_NOTE if ends else "", curves=(curve,), percent=ends, unit=unit), curve


def _chart(groups: Sequence[Group], panel: Panel, curve: Curve, refused: Collection[str]) -> Chart | None:
    recorded = sum(r.curves.get(curve.who, curve.metric) is not None for g in groups for r in g.runs)
    if recorded < 2:
        return None
    series = {i: s for i, g in enumerate(groups) if (s := group_series(g, curve)) is not None and s.steps}
    values = [v for s in series.values() for v in s.values if math.isfinite(v)]
    if not values:
        return None
    log = panel.log and spans_decades(values)
    crowd = len(series) >= CROWD
    lines = [_line(groups[index], index, curve, found, crowd=crowd) for index, found in series.items()]
    level = None if "reverse_kl" in refused else _teacher(groups, panel, curve)
    return chart_of(
        Chart(
            title=_title(panel, curve),
            note=" ".join(filter(None, [_caution(groups, curve, refused), "Logarithmic axis." if log else ""])),
            unit=panel.unit,
            percent=panel.percent,
            log=log,
            zero=panel.from_zero and min(values) >= 0,
            lines=[*([level] if level else []), *lines],
        )
    )


def _title(panel: Panel, curve: Curve) -> str:
    """Of a panel of several curves: Held-out accuracy, greedy; Reverse KL, held out; Entropy, teacher."""
    if len(panel.curves) == 1:
        return panel.title
    words = curve.label.split(", ")
    if "KL" in words[0]:
        return curve.label[0].upper() + curve.label[1:]
    if panel.title.startswith("Held-out") or words == ["training"]:
        words = words[1:]
    return ", ".join([panel.title, *words])


def _caution(groups: Sequence[Group], curve: Curve, refused: Collection[str]) -> str:
    """A sentence where the lines are of different quantities."""
    first, *others = [run for group in groups for run in group.runs]
    if curve.metric == "loss" and any(differing(first, run, _minimised(first, run)) for run in others):
        return "The runs minimise different things: do not compare the heights."
    if curve.who is not None and ("accuracy" in refused or curve.metric in refused):
        return "The runs did not measure the same: see the notes at the top."
    if curve.metric.endswith("_kl") and "reverse_kl" in refused and "accuracy" not in refused:
        return "The runs have different teachers: do not compare the heights."
    return ""


def _minimised(one: Run, two: Run) -> list[str]:
    return sorted(key for key in {*(one.recipe or {}), *(two.recipe or {})} if key.startswith(("objective.", "rl.")))


def _line(group: Group, index: int, curve: Curve, series: Series, *, crowd: bool) -> Line:
    training = curve.who is None
    points = thinned(series, CROWD_POINTS if crowd and training else POINTS)
    found = bounds(points)
    if group.is_many:  # its band holds the extremes already, and says nothing where all seeds agree
        agree = all(series.intervals[i] == (v, v) for i, v in enumerate(series.values))
        found = {} if agree else {name: values for name, values in found.items() if name in ("low", "high")}
    elif crowd and training and points.extremes is not None:
        found |= _spikes(points)
    return Line(
        label=f"{group.mark} {shorten(group.name, LABEL)}",
        color=index % COLORS,
        dash=DASHES[index // COLORS % len(DASHES)],
        kind="points" if curve.ends else "line",
        x=points.steps,
        y=rounded(points.values),
        smooth=training and len(points.steps) >= SMOOTH_FROM and not crowd,
        marks=not training,
        **found,
    )


def _spikes(points: Series) -> dict[str, list[float | None]]:
    """The smallest and the largest value of the bins where they stand out; of the others, the mean."""
    extremes = points.extremes or []
    usual = median(high - low for low, high in extremes)
    kept = [
        pair if pair[1] - pair[0] > STANDS_OUT * usual else (mean, mean)
        for pair, mean in zip(extremes, points.values, strict=True)
    ]
    return {"min": rounded(low for low, _ in kept), "max": rounded(high for _, high in kept)}


def _teacher(groups: Sequence[Group], panel: Panel, curve: Curve) -> Line | None:
    """The mean of what the runs measured of their teacher."""
    runs = [run for group in groups for run in group.runs]
    if panel.teacher_level is None or curve.metric != panel.teacher_level or curve.who != "student":
        return None
    known = [r.teacher_evaluation.metrics.get(curve.metric) for r in runs if r.teacher_evaluation is not None]
    values = [value for value in known if value is not None]
    if not values:
        return None
    last = max(run.curves.last for run in runs)
    height = rounded([fmean(values)] * 2)
    return Line(label="teacher", color=TEACHER, kind="level", x=[0, max(last, 1)], y=height)

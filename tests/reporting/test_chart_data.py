"""Metrics → charts: extremes survive, nothing is drawn around nothing, and what is one quantity is drawn once."""

from __future__ import annotations

import math

import pytest

from opd.reporting.panels import Curve, Panel
from opd.reporting.plots import Chart, Line, chart_of, panel_chart, spoken
from opd.reporting.record import MetricsRecord
from opd.reporting.sections import axes, chart_groups
from opd.reporting.series import MAX_POINTS, Curves, Series, thinned


def series(values: list[float]) -> Series:
    return Series(steps=range(len(values)), values=values, intervals=[None] * len(values))


def curves(**metrics: list[float]) -> Curves:
    """Training metrics by step; "__" in a name stands for "/"."""
    names = {name.replace("__", "/"): values for name, values in metrics.items()}
    steps = range(max(map(len, names.values())))
    return Curves(
        MetricsRecord(kind="step", step=s, metrics={name: v[s] for name, v in names.items() if s < len(v)})
        for s in steps
    )


def charts(found: Curves) -> dict[str, Chart]:
    return {chart.title: chart for group in chart_groups(found) for chart in group.charts}


@pytest.mark.parametrize(("at", "height"), [(0, 50.0), (1500, 50.0), (2999, 50.0), (1500, -7.0)])
def test_thinning_keeps_the_height_and_the_bin_of_a_spike(at, height):
    values = [1.0] * 3000
    values[at] = height
    found = thinned(series(values))
    assert len(found.steps) <= MAX_POINTS and found.extremes is not None
    part = at * len(found.steps) // 3000
    assert found.steps[part] <= at < found.steps[part] + 6
    assert found.extremes[part] == ((1.0, height) if height > 1 else (height, 1.0))
    assert [extreme for i, extreme in enumerate(found.extremes) if i != part] == [(1.0, 1.0)] * (len(found.steps) - 1)
    assert found.values[part] == pytest.approx((5 + height) / 6)


def test_a_run_within_the_limit_is_drawn_as_recorded():
    short = series([float(i % 7) for i in range(MAX_POINTS)])
    assert thinned(short) is short


def test_bins_without_a_finite_value_are_gaps_and_the_widest_interval_of_a_bin_counts():
    long = Series(
        steps=range(1000),
        values=[math.nan] * 2 + [1.0, math.nan] * 499,
        intervals=[(0.0, 1.0), (-1.0, 0.5)] * 500,
    )
    found = thinned(long)
    assert found.extremes is not None
    assert all(map(math.isnan, (found.values[0], *found.extremes[0])))
    assert (found.values[1], found.extremes[1], found.intervals[1]) == (1.0, (1.0, 1.0), (-1.0, 1.0))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.0] * 4, "at each of 4 steps"),
        ([2.0], "at step 0"),
        ([0.0, math.nan, 0.0], "at each of 2 steps"),
        ([0.0] * 4000, "at every step"),
        ([math.nan] * 3, "never"),
    ],
)
def test_what_never_changes_is_a_value_and_no_chart(values, said):
    (found,) = charts(curves(odd=values)).values()
    assert not found.lines
    (value,) = found.values
    assert said in value.said
    assert value.text == ("—" if math.isnan(values[0]) else f"{values[0]:g}")


def test_a_metric_whose_bins_have_one_mean_and_different_values_is_a_chart():
    (found,) = charts(curves(odd=[0.0, 1.0] * 2000)).values()
    (line,) = found.lines
    assert (line.min, line.max) == ([0.0] * 500, [1.0] * 500) and set(line.y) == {0.5}


def test_a_chart_with_one_moving_line_keeps_the_constant_ones():
    lines = [Line(label="still", x=[0, 1], y=[1.0, 1.0]), Line(label="moving", x=[0, 1], y=[1.0, 2.0])]
    assert [line.label for line in chart_of(Chart(title="t", lines=lines)).lines] == ["still", "moving"]


def test_the_loss_is_drawn_once_where_it_is_the_reverse_kl_at_every_step():
    kl = [1.0, 0.5, 0.25]
    same = charts(curves(loss=[value * (1 + 1e-6) for value in kl], reverse_kl=kl))
    assert "Loss" not in same and "The loss is this reverse KL" in same["Divergence from the teacher"].note
    other = charts(curves(loss=[1.0, 0.5, 0.26], reverse_kl=kl))
    assert "Loss" in other and "The loss" not in other["Divergence from the teacher"].note


def test_the_forward_kl_has_a_colour_that_neither_model_has():
    found = charts(
        curves(reverse_kl=[1.0, 0.5], forward_kl=[1.0, 0.4], student_entropy=[1.0, 0.5], teacher_entropy=[1, 2])
    )
    colors = {line.label: line.color for chart in found.values() for line in chart.lines}
    assert colors["forward KL"] not in (colors["student"], colors["teacher"], colors["reverse KL"])


def test_a_wide_positive_range_is_logarithmic_and_zero_or_less_is_not():
    panel = Panel(title="t", note="n.", curves=(Curve(metric="odd", label="x"),), log=True)
    for values, log in (([0.01, 1.0], True), ([0.5, 1.0], False), ([0.0, 100.0], False), ([-1.0, 100.0], False)):
        chart = panel_chart(panel, curves(odd=values))
        assert chart is not None and chart.log is log and ("Logarithmic" in chart.note) is log


def test_a_learning_rate_is_a_schedule_and_is_not_smoothed():
    found = charts(curves(lr=[i / 100 for i in range(100)], grad_norm=[float(i) for i in range(100)]))
    assert [found[title].lines[0].smooth for title in ("Learning rate", "Gradient norm")] == [False, True]


def test_one_slow_step_of_a_long_run_shows_in_the_time_per_step():
    seconds = [1.0] * 3000
    seconds[1000] = 60.0
    lines = charts(curves(time__step=seconds, time__rollout=[0.5] * 3000))["Time per step"].lines
    assert [line.kind for line in lines] == ["stack", "stack", "line"]
    assert lines[-1].max is not None and max(value or 0 for value in lines[-1].max) == 60.0


def test_axes_are_what_was_seen_before_each_step():
    root, tokens, time = axes(
        curves(start_kl=[0.0, 0.25, 1.0], tokens=[10.0, 20.0, 30.0], time__step=[60.0, 120.0, 60.0])
    )
    assert (root.steps, root.values) == ([0, 1, 2], [0.0, 0.5, 1.0])
    assert (tokens.steps, tokens.values) == ([0, 1, 2, 3], [0.0, 10.0, 30.0, 60.0])
    assert (time.unit, time.values) == ("minutes", [0.0, 1.0, 3.0, 4.0])
    assert axes(curves(loss=[1.0])) == []


def test_an_axis_of_a_long_run_keeps_its_ends_and_its_sums():
    (tokens,) = axes(curves(tokens=[2.0] * 4001))
    assert len(tokens.steps) <= MAX_POINTS + 1
    assert tokens.values == [2.0 * step for step in tokens.steps]
    assert (tokens.steps[0], tokens.steps[-1]) == (0, 4001)


def test_the_json_of_a_chart_has_the_fields_that_the_page_reads():
    (found,) = charts(curves(odd=[1.0, math.nan, 3.0])).values()
    drawn = found.to_json()
    assert set(drawn) == {"title", "note", "x_label", "unit", "percent", "log", "zero", "lines"}
    (line,) = drawn["lines"]
    assert (line["x"], line["y"], line["kind"], line["min"], line["low"]) == (
        [0, 1, 2],
        [1.0, None, 3.0],
        "line",
        None,
        None,
    )


def test_values_are_spoken_with_their_unit():
    assert spoken(0.97712, percent=True) == "97.7%"
    assert spoken(12345.6, unit="tokens") == "12,346 tokens"
    assert spoken(0.0123456, unit="nats") == "0.01235 nats"

"""Curves of compared runs on top of each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from opd.reporting import RunRecorder
from opd.reporting.compare_charts import chart_groups, shorten
from opd.reporting.plots import Line
from opd.reporting.runs import Group, grouped, read_runs
from reporting.compare_inputs import write_compared


def groups_of(*runs: Path) -> list[Group]:
    return grouped(read_runs(runs))


def a_curve(folder: Path, name: str, values: Sequence[float], lr: float) -> Path:
    run = write_compared(folder / name, optimizer__lr=lr)
    with RunRecorder(run, resume_step=0) as recorder:
        for step, value in enumerate(values):
            recorder.step(step, {"grad_norm": value})
    return run


def lines_of(groups: Sequence[Group], title: str) -> Sequence[Line]:
    (chart,) = [chart for section in chart_groups(groups) for chart in section.charts if chart.title == title]
    return chart.lines


@pytest.mark.parametrize("runs", [2, 5])
def test_a_spike_of_one_step_of_one_run_is_drawn_at_its_height(tmp_path: Path, runs: int):
    calm = [1 + 0.1 * (step % 7) for step in range(3000)]
    wild = [50.0 if step == 1234 else value for step, value in enumerate(calm)]
    folders = [a_curve(tmp_path, f"run{i}", wild if i == 1 else calm, lr=i + 1.0) for i in range(runs)]
    lines = lines_of(groups_of(*folders), "Gradient norm")
    calm_top, wild_top = (max(v for v in line.max or () if v is not None) for line in lines[:2])
    assert calm_top < 2 and wild_top == 50
    assert all(len(line.x) <= 300 for line in lines)


def test_of_many_lines_the_usual_noise_is_not_drawn(tmp_path: Path):
    folders = [a_curve(tmp_path, f"run{i}", [step % 7 for step in range(3000)], lr=i + 1.0) for i in range(4)]
    for line in lines_of(groups_of(*folders), "Gradient norm"):
        assert line.min == line.max == line.y and not line.smooth


def test_the_mean_of_seeds_ends_where_the_first_of_them_ends(tmp_path: Path):
    runs = [write_compared(tmp_path / f"a{s}", seed=s, finished=False) for s in (1, 2)]
    for run, values in zip(runs, ([1.0, 2.0, 3.0], [3.0, 4.0]), strict=True):
        with RunRecorder(run, resume_step=0) as recorder:
            for step, value in enumerate(values):
                recorder.step(step, {"loss": value})
    (line,) = lines_of(groups_of(*runs), "Loss")
    assert (line.x, line.y, line.low, line.high) == ([0, 1], [2.0, 3.0], [1.0, 2.0], [3.0, 4.0])


def test_a_metric_of_one_run_alone_has_no_chart(tmp_path: Path):
    one, two = write_compared(tmp_path / "one"), write_compared(tmp_path / "two", optimizer__lr=1.0)
    with RunRecorder(one, resume_step=4) as recorder:
        recorder.step(4, {"own": 1.0, "tokens": 7.0})
    titles = [chart.title for section in chart_groups(groups_of(one, two)) for chart in section.charts]
    assert "own" not in titles and "Tokens per step" in titles


def test_losses_of_other_objectives_carry_a_warning(tmp_path: Path):
    one = write_compared(tmp_path / "one")
    two = write_compared(tmp_path / "two", objective__divergence="forward_kl")
    three = write_compared(tmp_path / "three", optimizer__lr=1.0)
    notes = [
        next(c.note for section in chart_groups(groups_of(one, other)) for c in section.charts if c.title == "Loss")
        for other in (two, three)
    ]
    assert "minimise different things" in notes[0] and notes[1] == ""


def test_a_long_name_keeps_its_end():
    assert shorten("a-name", 10) == "a-name"
    assert shorten("a-long-name-seed1", 11) == "a-lon…seed1"

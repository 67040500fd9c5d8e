"""What a reader of the table would miss is said, with what to change."""

from __future__ import annotations

import json
import math

import pytest
from report_inputs import SUMMARY, write_run

from opd.reporting.findings import cut_off, teacher_no_better
from opd.reporting.record import MetricsRecord, comparable
from opd.reporting.report import render_report, write_report
from opd.reporting.sections import chart_groups
from opd.reporting.series import Curves
from opd.reporting.summary import summary_cells, summary_notes, summary_rows


def test_a_quarter_of_answers_cut_off_is_said_and_less_is_not():
    assert cut_off(0.24, 16) is None
    said = cut_off(0.63, 16)
    assert said is not None and said.startswith("63% of the answers were cut off at rollout.max_new_tokens=16")
    assert "Raise rollout.max_new_tokens" in said


@pytest.mark.parametrize("shown_more", [False, True])
def test_a_teacher_within_the_student_s_interval_is_no_better(shown_more):
    assert teacher_no_better(0.5, (0.4, 0.6), 0.61, shown_more=shown_more) is None
    said = teacher_no_better(0.5, (0.4, 0.6), 0.6, shown_more=shown_more)
    assert said is not None and "60.0% against 50.0% [40.0, 60.0]" in said
    assert ("although it is shown prompts.teacher_prompt" in said) == shown_more
    assert teacher_no_better(0.5, (math.nan, math.nan), 0.5, shown_more=shown_more) is None


def test_a_teacher_that_was_shown_more_says_so_in_table_chart_and_page():
    summary = {
        **SUMMARY,
        "teacher": {**SUMMARY["teacher"], "shown": "prompts.teacher_prompt"},
        "notes": ["64% cut <b>"],
    }
    rows = summary_rows(summary)
    assert [row[0] for row in summary_cells(rows)[1]] == [
        "student before",
        "student after",
        "teacher, shown prompts.teacher_prompt",
    ]
    records = [MetricsRecord(kind="eval", step=s, metrics={"accuracy": 0.5 + s / 10}, who="student") for s in (0, 4)]
    accuracy = chart_groups(Curves(records), rows)[0].charts[0]
    assert [line.label for line in accuracy.lines] == ["teacher, shown prompts.teacher_prompt", "student"]
    page = render_report(title="t", metrics=records, summary=summary)
    assert "teacher, shown prompts.teacher_prompt" in page and "64% cut &lt;b&gt;" in page
    assert summary_notes(summary) == ["64% cut <b>"] and summary_notes({}) == []


@pytest.mark.parametrize("name", ["accuracy_greedy", "accuracy_t0.5"])
def test_what_is_measured_at_the_ends_alone_is_drawn_as_points_with_bars(name):
    records = [
        MetricsRecord(
            kind="eval",
            step=step,
            who="student",
            metrics={"accuracy": 0.5 + step / 100, **({name: value} if value is not None else {})},
            intervals={name: (value - 0.1, value + 0.2)} if value is not None else {},
        )
        for step, value in ((0, 0.25), (5, None), (10, 0.75))
    ]
    charts = [chart for group in chart_groups(Curves(records)) for chart in group.charts]
    (drawn,) = [line for chart in charts for line in chart.lines if line.y == [0.25, 0.75]]
    assert (drawn.kind, drawn.x) == ("points", [0, 10])
    assert (drawn.low, drawn.high) == ([0.15, 0.65], [0.45, 0.95])
    (other,) = [line for chart in charts for line in chart.lines if line.x == [0, 5, 10]]
    assert other.kind == "line" and other.marks


def test_evaluations_of_another_measure_are_left_out_and_training_is_not():
    def record(step: int, measure: str | None, kind: str = "eval") -> MetricsRecord:
        return MetricsRecord(kind=kind, step=step, metrics={}, measure=measure)  # pyright: ignore[reportArgumentType]

    before, after = [record(0, "a"), record(2, None, "step")], [record(3, "b"), record(4, None)]
    assert comparable([*before, *after]) == [before[1], *after]
    assert comparable([before[1], record(4, None)]) == [before[1], record(4, None)]


def test_the_page_tells_what_a_resumed_run_went_on_with(tmp_path):
    run = write_run(tmp_path / "run")
    lines = [{"step": 0, "changed": {}}, {"step": 2, "changed": {"optimizer.lr": [0.1, 0.01], "run_dir": ["a", "b"]}}]
    (run / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "chan')
    page = write_report(run).read_text()
    assert "From step 2 on: optimizer.lr 0.1 → 0.01." in page and "From step 0 on" not in page

from __future__ import annotations

import json
import math

import pytest
from report_inputs import SUMMARY

from opd.errors import RunFolderError
from opd.reporting import SummaryRow, read_summary, summary_rows, summary_table, summary_text, write_summary


def test_the_text_holds_each_row_with_its_intervals():
    before, after, teacher = [line for line in summary_text(summary_rows(SUMMARY)).splitlines() if "%" in line][-3:]
    assert "student before" in before and "12.5% [8.0, 19.0]" in before and "0.750" in before
    assert (
        "student after" in after
        and "62.5% [55.0, 69.0]" in after
        and "0.0625 [0.0500, 0.0750]" in after
        and "68.8%" in after
    )
    assert "teacher" in teacher and "87.5% [81.0, 92.0]" in teacher and "—" in teacher


def test_the_text_is_plain_and_never_wraps():
    row = SummaryRow(title="student after", extra={f"accuracy_t{i}": 0.5 for i in range(6)})
    text = summary_text([row])
    assert "\x1b" not in text
    assert sum("student after" in line for line in text.splitlines()) == 1
    assert text.count("50.0%") == 6


def test_extra_columns_appear_in_words_and_empty_ones_not_at_all():
    extra = {"accuracy_t0.5": 0.4, "accuracy_greedy": 0.25, "response_length": 1234.0}
    rows = [SummaryRow(title="student after", accuracy=0.5, extra=extra)]
    titles = [column.header for column in summary_table(rows).columns]
    assert titles == ["", "accuracy", "accuracy, T = 0.5", "accuracy, greedy", "response length"]
    assert "25.0%" in summary_text(rows)
    assert "1,234" in summary_text(rows)


def test_unknown_intervals_and_values_are_left_out():
    rows = [SummaryRow(title="teacher", accuracy=0.5, accuracy_interval=(-math.inf, math.inf), reverse_kl=math.nan)]
    line = summary_text(rows).splitlines()[-2]
    assert "50.0%" in line
    assert "[" not in line
    assert "nan" not in line


def test_a_summary_survives_writing_and_reading(tmp_path):
    write_summary(tmp_path / "summary.json", SUMMARY)
    assert read_summary(tmp_path) == SUMMARY


def test_a_summary_is_strict_json_even_with_nan(tmp_path):
    write_summary(tmp_path / "summary.json", {"teacher": {"accuracy": math.nan, "interval": (0.5, math.inf)}})
    content = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    assert content == {"teacher": {"accuracy": None, "interval": [0.5, None]}}
    assert summary_rows(content)[0].accuracy is None


def test_a_failed_write_leaves_the_old_summary(tmp_path):
    path = tmp_path / "summary.json"
    write_summary(path, SUMMARY)
    with pytest.raises(TypeError):
        write_summary(path, {"teacher": object()})
    assert read_summary(tmp_path) == SUMMARY
    assert list(tmp_path.iterdir()) == [path]


def test_a_summary_in_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match="Check the spelling"):
        write_summary(tmp_path / "missing" / "summary.json", SUMMARY)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_summary_is_refused(tmp_path, content):
    (tmp_path / "summary.json").write_text(content, "utf-8")
    with pytest.raises(RunFolderError, match=r"summary\.json"):
        read_summary(tmp_path)


def test_a_run_without_summary_has_none(tmp_path):
    assert read_summary(tmp_path) is None

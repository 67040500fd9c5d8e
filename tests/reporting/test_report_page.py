from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import cast

import plotly.graph_objects as go
import pytest
from report_inputs import SUMMARY, a_sample, write_run

from opd.errors import RunFolderError
from opd.reporting import RunRecorder, write_report, write_summary
from opd.reporting.record import MetricsRecord, Who
from opd.reporting.report import render_report

VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """A page as a browser takes it apart; refuses tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.data: list[object] = []
        self.styles = ""
        self.text = ""
        self._open: list[str] = []
        self._is_data = False
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "script":
            self._is_data = dict(attrs).get("type") == "application/json"
            if not self._is_data:
                self.scripts.append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        inside = self._open[-1] if self._open else ""
        if inside == "script" and self._is_data:
            assert "<" not in data, "could close the script element"
            self.data.append(json.loads(data))
        elif inside == "script":
            self.scripts[-1] += data
        elif inside == "style":
            self.styles += data
        else:
            self.text += data

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.tags if name in (attrs.get("class") or "").split()]

    @property
    def viewer(self) -> dict:
        (found,) = [data for data in self.data if isinstance(data, dict) and "samples" in data]
        return found

    @property
    def charts(self) -> list[dict]:
        return [figure for figure in self.data if isinstance(figure, dict) and "layout" in figure]


def page_of(run: Path, **options) -> Page:
    return Page(write_report(run, **options).read_text("utf-8"))


def traces(page: Page) -> list[dict]:
    return [trace for figure in page.charts for trace in figure["data"]]


def step(number: int, **metrics: float) -> MetricsRecord:
    return MetricsRecord(kind="step", step=number, metrics={name.replace("__", "/"): v for name, v in metrics.items()})


def test_the_report_is_one_file_that_asks_the_network_for_nothing(tmp_path):
    run = write_run(tmp_path / "run")
    html = write_report(run).read_text("utf-8")
    page = Page(html)
    fetching = {"src", "href", "srcset", "action", "data", "poster", "xlink:href", "background"}
    assert [(tag, attrs) for tag, attrs in page.tags if fetching & attrs.keys()] == []
    assert {"link", "img", "iframe", "object", "base"}.isdisjoint(tag for tag, _ in page.tags)
    assert re.search(r"url\(|@import|https?:", page.styles) is None
    theme, plotly, own, _viewer = page.scripts
    assert "plotly.js" in plotly[:100]
    assert re.search(r"https?:|//[a-z]+\.|fetch\(|XMLHttpRequest|import\(", theme + own) is None
    (policy,) = [attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy


def test_the_page_shows_every_number_of_the_summary(tmp_path):
    text = page_of(write_run(tmp_path / "run")).text
    for number in (
        "12.5%",
        "62.5%",
        "68.8%",
        "87.5%",
        "[8.0, 19.0]",
        "[55.0, 69.0]",
        "[81.0, 92.0]",
        "0.750",
        "0.0625",
    ):
        assert number in text
    assert "1:02:45" in text
    # (0.625 − 0.125) / (0.875 − 0.125)
    assert "67%" in text


def test_curves_hold_the_recorded_values(tmp_path):
    drawn = traces(page_of(write_run(tmp_path / "run")))
    assert any(t["x"] == [0, 1, 2, 3] and t["y"] == [1, 0.5, 0.333333, 0.25] for t in drawn), "loss"
    (student,) = [t for t in drawn if t.get("name") == "student" and t["y"] == [0, 0.25, 0.5]]
    assert student["x"] == [0, 2, 4]
    assert student["customdata"] == [[0, 0.75]] * 3
    (teacher,) = [t for t in drawn if t.get("name") == "teacher"]
    assert teacher["y"] == [0.875, 0.875]
    assert teacher["x"] == [0, 4]


def test_the_accuracy_band_spans_its_interval(tmp_path):
    drawn = traces(page_of(write_run(tmp_path / "run")))
    bands = [t for t in drawn if t.get("fill") == "toself"]
    assert {(min(t["y"]), max(t["y"])) for t in bands} == {(0, 0.75), (0.81, 0.92)}


def test_the_teacher_level_comes_from_the_summary_when_it_was_not_evaluated():
    records = [MetricsRecord(kind="eval", step=i, who="student", metrics={"accuracy": 0.25}) for i in range(2)]
    page = Page(render_report(title="t", metrics=records, summary=SUMMARY))
    assert [0.875, 0.875] in [trace["y"] for trace in traces(page) if trace.get("name") == "teacher"]


def test_phases_and_the_rest_of_the_step_are_stacked(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    (figure,) = [figure for figure in page.charts if figure["layout"].get("barmode") == "stack"]
    assert {trace["name"]: trace["y"] for trace in figure["data"]} == {"rollout": [2] * 4, "rest of the step": [1] * 4}


def test_plotly_accepts_every_figure(tmp_path):
    records = [step(i, loss=0.5**i, time__rollout=1.0, kl_by_position__0=1.0, on_policy__loss=0.5) for i in range(100)]
    pages = [page_of(write_run(tmp_path / "run")), Page(render_report(title="t", metrics=records))]
    for figure in (figure for page in pages for figure in page.charts):
        text = re.sub(r"var\(--[\w-]+\)", "#123456", json.dumps(figure))
        go.Figure(json.loads(text))


def test_every_colour_of_a_figure_is_defined_for_both_themes(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    used = set(re.findall(r"var\((--[\w-]+)\)", json.dumps(page.data) + page.styles))
    for theme in ("light", "dark"):
        blocks = re.findall(rf'\[data-theme="{theme}"\]\s*\{{(.*?)\}}', page.styles, re.DOTALL)
        assert used <= set(re.findall(r"(--[\w-]+):", "".join(blocks)))


def test_an_unknown_metric_appears_under_other_metrics(tmp_path):
    html = write_report(write_run(tmp_path / "run")).read_text("utf-8")
    assert "my/own metric" in html[html.index("<h2>Other metrics</h2>") :]


def test_the_teacher_level_of_a_panel_is_its_own_metric():
    records = [step(0, response_length=50.0), step(1, response_length=60.0)]
    without = traces(Page(render_report(title="t", metrics=records, summary=SUMMARY)))
    assert "teacher" not in [trace.get("name") for trace in without]
    teacher = MetricsRecord(kind="eval", step=0, who="teacher", metrics={"response_length": 90.0})
    page = Page(render_report(title="t", metrics=[*records, teacher], summary=SUMMARY))
    assert [trace["y"] for trace in traces(page) if trace.get("name") == "teacher"] == [[90, 90]]


def test_no_metric_is_lost():
    names = "loss forward_kl overlap eos_prob grad_norm lr tokens clamped_tokens unheard_of time/rollout"
    names += " time/tokens_per_second on_policy/loss off_policy/loss kl_by_position/0 kl_by_position/last"
    values = {name: 1000.0 + i for i, name in enumerate(names.split())}
    records = [MetricsRecord(kind="step", step=0, metrics=values)]
    evaluation = {"accuracy": 1.0, "odd": 2.0, "reverse_kl": 3.0, "truncated": 4.0}
    for who, offset in (("student", 2000.0), ("teacher", 3000.0)):
        metrics = {name: offset + value for name, value in evaluation.items()}
        records.append(MetricsRecord(kind="eval", step=0, who=cast(Who, who), metrics=metrics))
    drawn = {y for trace in traces(Page(render_report(title="t", metrics=records))) for y in trace["y"]}
    recorded = {value for record in records for value in record.metrics.values()}
    assert recorded - drawn == set()


def test_a_source_metric_is_drawn_once_per_source():
    records = [step(i, on_policy__reverse_kl=1.0, off_policy__reverse_kl=2.0) for i in range(2)]
    page = Page(render_report(title="t", metrics=records))
    assert [(trace["name"], trace["y"]) for trace in traces(page)] == [("on-policy", [1, 1]), ("off-policy", [2, 2])]


def test_kl_by_position_compares_the_first_steps_with_the_last():
    records = [step(i, kl_by_position__10=1.0 + i, kl_by_position__2=0.5 + i) for i in range(20)]
    page = Page(render_report(title="t", metrics=records))
    drawn = {trace["name"]: (trace["x"], trace["y"]) for trace in traces(page)}
    assert drawn == {"first steps": ([2, 10], [1, 1.5]), "last steps": ([2, 10], [19, 19.5])}


def test_a_long_run_is_averaged_into_few_points():
    records = [step(i, loss=float(i % 2)) for i in range(8000)]
    page = Page(render_report(title="t", metrics=records))
    assert all(len(trace["x"]) <= 800 for trace in traces(page))
    assert all(y == pytest.approx(0.5) for trace in traces(page) for y in trace["y"])


def test_hostile_text_stays_text_wherever_it_comes_from(tmp_path):
    with RunRecorder(tmp_path, resume_step=None) as recorder:
        for number in range(2):
            recorder.step(number, {"loss": 1.0, HOSTILE: 2.0, f"time/{HOSTILE}": 1.0})
        for phase, who in (("eval", "student"), ("eval", "teacher"), ("train", "student")):
            for at in (0, 2):
                values = {"response": HOSTILE, "answer": HOSTILE, "phase": phase, "who": who}
                recorder.sample(a_sample(at, HOSTILE, tokens=(HOSTILE, '"onmouseover="alert(3)', "<b>"), **values))
                recorder.sample(a_sample(at, f"{HOSTILE} {at}", tokens=(), **values))
    write_summary(tmp_path / "summary.json", {**SUMMARY, "teacher": {HOSTILE: 1.0, "accuracy": 0.5}})
    (tmp_path / "config.yaml").write_text(f"name: {HOSTILE}\n", "utf-8")
    page = page_of(tmp_path, title=HOSTILE)
    assert len([tag for tag, attrs in page.tags if tag == "script" and not attrs]) == 4
    assert not any("alert" in script for script in (page.scripts[0], page.scripts[2]))
    assert {"img", "b"}.isdisjoint(tag for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.text.count("<script>alert(1)</script>") >= 10
    # Plotly reads names as HTML, too.
    assert not any("<" in str(trace.get("name", "")) for trace in traces(page))


def test_the_page_holds_every_token_and_its_kl(tmp_path):
    with RunRecorder(tmp_path, resume_step=None) as recorder:
        recorder.sample(a_sample(tokens=("a", "\n", " b") * 1000, reverse_kl=(0.0, 0.5, 7.0) * 1000))
    data = page_of(tmp_path).viewer
    (sample,) = data["samples"]
    assert [data["texts"][i] for i in sample["tokens"]] == ["a", "↵\n", " b"] * 1000
    assert sample["reverse_kl"] == [0, 0.5, 7] * 1000


def test_the_configuration_is_shown_collapsed(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_text("top_k: 64\n", "utf-8")
    page = page_of(run)
    assert "top_k: 64" in page.text
    assert all("open" not in attrs for tag, attrs in page.tags if tag == "details")


def test_one_step_without_evaluations_samples_or_summary_makes_a_page(tmp_path):
    run = write_run(tmp_path / "run", steps=1, evaluations=False, samples=False, summary=False)
    page = page_of(run)
    assert [1] in [trace["y"] for trace in traces(page)]
    for missing in ("no evaluations", "no summary.json", "No responses"):
        assert missing in page.text


def test_a_run_that_recorded_nothing_says_so(tmp_path):
    RunRecorder(tmp_path, resume_step=None).close()
    page = page_of(tmp_path)
    assert "recorded nothing yet" in page.text
    assert page.charts == []


def test_a_summary_alone_makes_a_page(tmp_path):
    write_summary(tmp_path / "summary.json", SUMMARY)
    page = page_of(tmp_path)
    assert "62.5%" in page.text
    assert "No training step" in page.text


def test_nan_makes_a_gap_and_no_error():
    page = Page(render_report(title="t", metrics=[step(0, loss=1.0), step(1, loss=float("nan")), step(2, loss=2.0)]))
    assert [1, None, 2] in [trace["y"] for trace in traces(page)]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match="not a run folder"):
        write_report(tmp_path)
    with pytest.raises(RunFolderError, match="no folder"):
        write_report(tmp_path / "missing")


def test_the_report_goes_where_it_is_told_and_defaults_to_the_run_folder(tmp_path):
    run = write_run(tmp_path / "run")
    assert write_report(run) == run / "report.html"
    elsewhere = tmp_path / "new" / "page.html"
    assert write_report(run, out=elsewhere, title="A title") == elsewhere
    assert "<h1>A title</h1>" in elsewhere.read_text("utf-8")


def test_the_same_run_gives_the_same_page(tmp_path):
    run = write_run(tmp_path / "run")
    assert write_report(run).read_bytes() == write_report(run, out=tmp_path / "again.html").read_bytes()

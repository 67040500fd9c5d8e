from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import cast

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
        self.styles: list[str] = []
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
            self.styles.append(data)
        else:
            self.text += data

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.tags if name in (attrs.get("class") or "").split()]

    @property
    def charts(self) -> list[dict]:
        return [data for data in self.data if isinstance(data, dict) and "lines" in data]

    @property
    def policy(self) -> dict[str, list[str]]:
        (content,) = [
            attrs["content"] for _, attrs in self.tags if attrs.get("http-equiv") == "Content-Security-Policy"
        ]
        parts = [part.split() for part in (content or "").split("; ")]
        return {name: allowed for name, *allowed in parts}


def page_of(run: Path, **options) -> Page:
    return Page(write_report(run, **options).read_text("utf-8"))


def lines(page: Page) -> list[dict]:
    return [line for chart in page.charts for line in chart["lines"]]


def line(page: Page, label: str) -> dict:
    (found,) = [line for line in lines(page) if line["label"] == label]
    return found


def chart(page: Page, title: str) -> dict:
    (found,) = [chart for chart in page.charts if chart["title"] == title]
    return found


def sha256(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def step(number: int, **metrics: float) -> MetricsRecord:
    return MetricsRecord(kind="step", step=number, metrics={name.replace("__", "/"): v for name, v in metrics.items()})


def test_the_report_is_one_file_that_asks_the_network_for_nothing(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    fetching = {"src", "srcset", "action", "data", "poster", "xlink:href", "background"}
    assert [(tag, attrs) for tag, attrs in page.tags if fetching & attrs.keys()] == []
    assert all((attrs["href"] or "").startswith("#") for _, attrs in page.tags if "href" in attrs)
    assert {"link", "img", "iframe", "object", "base"}.isdisjoint(tag for tag, _ in page.tags)
    assert re.search(r"url\(|@import|https?:", "".join(page.styles)) is None
    scripts = "".join(page.scripts).replace('"http://www.w3.org/2000/svg"', "")
    assert re.search(r"https?:|fetch\(|XMLHttpRequest|import\(", scripts) is None


def test_the_policy_allows_the_scripts_and_styles_of_the_page_by_their_hashes_and_nothing_else(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    assert page.policy["default-src"] == page.policy["connect-src"] == ["'none'"]
    assert page.policy["base-uri"] == page.policy["form-action"] == ["'none'"]
    assert page.policy["script-src"] == [sha256(script) for script in page.scripts]
    assert page.policy["style-src"] == [sha256(style) for style in page.styles]
    assert not any("style" in attrs for _, attrs in page.tags), "the policy forbids style attributes"


def test_every_section_and_chart_has_an_anchor_of_its_own_and_the_contents_lead_to_each_section(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs["href"] for _, attrs in page.tags if "href" in attrs} <= {f"#{name}" for name in ids}
    for place in ("result", "learning", "optimizer-and-machine", "token-by-token", "other-metrics"):
        assert any(tag == "a" and attrs == {"href": f"#{place}"} for tag, attrs in page.tags), place
    assert "learning-held-out-accuracy" in ids


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
    assert "1 h 2 min" in text
    # (0.625 − 0.125) / (0.875 − 0.125)
    assert "67%" in text


def test_curves_hold_the_recorded_values(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    assert chart(page, "Loss")["lines"][0]["y"] == [1, 0.5, 0.333333, 0.25]
    student, teacher = line(page, "student"), line(page, "teacher")
    assert (student["x"], student["y"]) == ([0, 2, 4], [0, 0.25, 0.5])
    assert (student["low"], student["high"]) == ([0] * 3, [0.75] * 3)
    assert (teacher["kind"], teacher["x"], teacher["y"]) == ("level", [0, 4], [0.875, 0.875])
    assert (teacher["low"], teacher["high"]) == ([0.81] * 2, [0.92] * 2)


def test_the_teacher_level_comes_from_the_summary_when_it_was_not_evaluated():
    records = [MetricsRecord(kind="eval", step=i, who="student", metrics={"accuracy": i / 4}) for i in range(2)]
    page = Page(render_report(title="t", metrics=records, summary=SUMMARY))
    assert line(page, "teacher")["y"] == [0.875, 0.875]


def test_phases_and_the_rest_of_the_step_are_stacked():
    records = [step(i, time__rollout=2.0 + i, time__step=3.0 + 2 * i) for i in range(3)]
    drawn = chart(Page(render_report(title="t", metrics=records)), "Time per step")["lines"]
    assert [(line["label"], line["kind"], line["y"]) for line in drawn] == [
        ("rollout", "bars", [2, 3, 4]),
        ("rest of the step", "bars", [1, 2, 3]),
    ]


def test_every_colour_of_a_figure_is_defined_for_both_themes(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    styles = "".join(page.styles)
    used = {f"--{line['color']}" for line in lines(page)} | set(re.findall(r"var\((--[\w-]+)\)", styles)) - {"--c"}
    for theme in (":root", r'\[data-theme="?dark"?\]'):
        blocks = re.findall(rf"{theme}\s*\{{(.*?)\}}", styles, re.DOTALL)
        assert used <= set(re.findall(r"(--[\w-]+):", "".join(blocks)))


def test_an_unknown_metric_appears_under_other_metrics(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    assert chart(page, "my/own metric")["lines"][0]["y"] == [0, 1, 2, 3]
    assert any(attrs.get("id") == "other-metrics-my-own-metric-1" for _, attrs in page.tags)


def test_the_teacher_level_of_a_panel_is_its_own_metric():
    records = [step(0, response_length=50.0), step(1, response_length=60.0)]
    without = lines(Page(render_report(title="t", metrics=records, summary=SUMMARY)))
    assert "teacher" not in [line["label"] for line in without]
    teacher = MetricsRecord(kind="eval", step=0, who="teacher", metrics={"response_length": 90.0})
    page = Page(render_report(title="t", metrics=[*records, teacher], summary=SUMMARY))
    assert line(page, "teacher")["y"] == [90, 90]


@pytest.mark.parametrize("steps", [1, 2])
def test_no_metric_is_lost(steps):
    """As a curve, or, after one step, as a value."""
    names = "loss forward_kl overlap eos_prob grad_norm lr tokens clamped_tokens unheard_of time/rollout"
    names += " time/tokens_per_second on_policy/loss off_policy/loss kl_by_position/0 kl_by_position/last"
    values = {name: 100.0 + i for i, name in enumerate(names.split())}
    records = [
        MetricsRecord(kind="step", step=s, metrics={name: value + 0.1 * s for name, value in values.items()})
        for s in range(steps)
    ]
    evaluation = {"accuracy": 0.1, "odd": 0.2, "reverse_kl": 0.3, "truncated": 0.4}
    for who, offset in (("student", 200.0), ("teacher", 300.0)):
        metrics = {name: offset + value for name, value in evaluation.items()}
        records.append(MetricsRecord(kind="eval", step=0, who=cast(Who, who), metrics=metrics))
    page = Page(render_report(title="t", metrics=records))
    drawn = {y for line in lines(page) for y in line["y"]}
    words = page.text.replace(",", "")
    recorded = {value for record in records for value in record.metrics.values()}
    lost = [v for v in recorded if v not in drawn and f"{v:g}" not in words and f"{v:.1%}" not in words]
    assert lost == []


def test_a_source_metric_is_drawn_once_per_source():
    records = [step(i, on_policy__reverse_kl=1.0 + i, off_policy__reverse_kl=2.0) for i in range(2)]
    page = Page(render_report(title="t", metrics=records))
    assert [(line["label"], line["y"]) for line in lines(page)] == [("on-policy", [1, 2]), ("off-policy", [2, 2])]


def test_kl_by_position_compares_the_first_steps_with_the_last():
    records = [step(i, kl_by_position__10=1.0 + i, kl_by_position__2=0.5 + i) for i in range(20)]
    drawn = chart(Page(render_report(title="t", metrics=records)), "Reverse KL by position")
    assert {line["label"]: (line["x"], line["y"]) for line in drawn["lines"]} == {
        "first steps": ([2, 10], [1, 1.5]),
        "last steps": ([2, 10], [19, 19.5]),
    }
    assert drawn["x_label"] != "step"


def test_hostile_text_stays_text_wherever_it_comes_from(tmp_path):
    with RunRecorder(tmp_path, resume_step=None) as recorder:
        for number in range(2):
            recorder.step(number, {"loss": 1.0, HOSTILE: 2.0, f"time/{HOSTILE}": 1.0 + number})
        for phase, who in (("eval", "student"), ("eval", "teacher"), ("train", "student")):
            for at in (0, 2):
                values = {"response": HOSTILE, "answer": HOSTILE, "phase": phase, "who": who}
                recorder.sample(a_sample(at, HOSTILE, tokens=(HOSTILE, '"onmouseover="alert(3)', "<b>"), **values))
                recorder.sample(a_sample(at, f"{HOSTILE} {at}", tokens=(), **values))
    write_summary(tmp_path / "summary.json", {**SUMMARY, "teacher": {HOSTILE: 1.0, "accuracy": 0.5}})
    (tmp_path / "config.yaml").write_text(f"name: {HOSTILE}\n", "utf-8")
    page = page_of(tmp_path, title=HOSTILE)
    assert page.policy["script-src"] == [sha256(script) for script in page.scripts]
    assert not any("alert" in script for script in page.scripts)
    assert {"img", "b"}.isdisjoint(tag for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.text.count("<script>alert(1)</script>") >= 10
    assert HOSTILE in [line["label"] for line in lines(page)]


def test_tokens_carry_their_level_and_their_kl(tmp_path):
    with RunRecorder(tmp_path, resume_step=None) as recorder:
        recorder.sample(a_sample(tokens=("a", "\n", " b"), reverse_kl=(0.0, 0.5, 7.0)))
    page = page_of(tmp_path)
    tokens = [(attrs["class"], attrs["title"]) for attrs in page.with_class("t") if "title" in attrs]
    assert tokens == [("t k0", "“a”  0 nats"), ("t k4", "“↵”  0.5 nats"), ("t k6", "“ b”  7 nats")]
    assert "a↵\n b" in page.text


def test_early_and_late_answers_stand_side_by_side(tmp_path):
    text = page_of(write_run(tmp_path / "run")).text
    assert text.index("student, step 0") < text.index("student, step 4")


def test_a_long_response_is_cut_and_says_so(tmp_path):
    with RunRecorder(tmp_path, resume_step=None) as recorder:
        recorder.sample(a_sample(tokens=("word ",) * 2600))
    page = page_of(tmp_path)
    assert sum("title" in attrs for attrs in page.with_class("t")) == 600
    assert "and 2,000 more tokens" in page.text


def test_the_configuration_is_shown_collapsed(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_text("top_k: 64\n", "utf-8")
    page = page_of(run)
    assert "top_k: 64" in page.text
    assert all("open" not in attrs for tag, attrs in page.tags if tag == "details")


def test_one_step_without_evaluations_samples_or_summary_makes_a_page(tmp_path):
    run = write_run(tmp_path / "run", steps=1, evaluations=False, samples=False, summary=False)
    page = page_of(run)
    assert page.charts == [], "one point makes no chart"
    assert "Loss" in page.text and "1 at step 0" in page.text
    for missing in ("no evaluations", "has not ended", "No responses"):
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
    assert lines(page)[0]["y"] == [1, None, 2]
    assert "1 value of the run is not finite" in page.text


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


def test_a_prompt_shows_its_special_tokens_and_the_teachers_where_they_differ():
    student = [a_sample(step, "<|im_start|>q<|im_end|>", prompt_index=0) for step in (0, 4)]
    teacher = a_sample(0, "<start_of_turn>q", prompt_index=0, who="teacher", source="teacher")
    text = Page(render_report(title="t", metrics=[], samples=[*student, teacher])).text
    assert text.count("<|im_start|>q<|im_end|>") == 1 and text.count("<start_of_turn>q") == 1

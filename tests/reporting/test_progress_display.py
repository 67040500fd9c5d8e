from __future__ import annotations

import io
import re
from collections.abc import Mapping

import pytest

from opd.reporting.progress import Progress, duration

METRICS = {"loss": 0.25, "reverse_kl": 0.125, "student_entropy": 1.5, "time/tokens_per_second": 12345.6, "lr": 1.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _ordinary_terminal(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")


def run(progress: Progress, clock: Clock, steps: range, seconds: float = 2.0, metrics: Mapping[str, float] = METRICS):
    with progress:
        for step in steps:
            progress.phase("rollout")
            clock.now += seconds
            progress.update(step, metrics)


def test_a_plain_line_says_step_metrics_memory_and_time_left():
    out, clock = io.StringIO(), Clock()
    progress = Progress(20, enabled="plain", stream=out, clock=clock, memory=lambda: "GPU 12.3 GB")
    run(progress, clock, range(10), metrics=METRICS | {"truncated": 0.25, "reward/mean": 0.5})
    numbers = "loss 0.25  reverse KL 0.125  reward 0.5  truncated 25%  tokens/s 12,346  GPU 12.3 GB"
    assert out.getvalue() == f"step 1/20  {numbers}  ETA 0:38\nstep 10/20  {numbers}  ETA 0:20\n"


def test_reverse_kl_is_shown_only_where_it_is_not_the_loss():
    out = io.StringIO()
    with Progress(3, enabled="plain", stream=out, plain_every=1) as progress:
        for step, (loss, kl) in enumerate([(0.1 + 0.2, 0.3), (0.3, 0.31), (float("nan"), 0.3)]):
            progress.update(step, {"loss": loss, "reverse_kl": kl})
    assert ["reverse KL" in line for line in out.getvalue().splitlines()] == [False, True, True]


def test_plain_lines_come_at_the_first_step_every_n_steps_and_at_the_last():
    out, clock = io.StringIO(), Clock()
    run(Progress(25, enabled="plain", plain_every=10, stream=out, clock=clock), clock, range(25))
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1/25", "10/25", "20/25", "25/25"]


def test_a_slow_run_speaks_at_least_once_a_minute():
    out, clock = io.StringIO(), Clock()
    run(Progress(100, enabled="plain", stream=out, clock=clock), clock, range(5), seconds=35.0)
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1/100", "3/100", "5/100"]


def test_a_resumed_run_predicts_only_what_is_left():
    clock = Clock()
    progress = Progress(100, 90, enabled="off", clock=clock)
    run(progress, clock, range(90, 95), seconds=3.0)
    assert progress.seconds_left == 15.0


def test_a_resumed_run_speaks_at_its_first_step():
    out, clock = io.StringIO(), Clock()
    run(Progress(100, 93, enabled="plain", stream=out, clock=clock), clock, range(93, 96))
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["94/100"]


def test_the_prediction_follows_the_recent_steps():
    clock = Clock()
    progress = Progress(200, enabled="off", clock=clock)
    with progress:
        for step in range(100):
            clock.now += 50.0 if step < 50 else 1.0
            progress.update(step, {})
    assert progress.seconds_left == 100.0


def test_off_prints_nothing():
    out, clock = Terminal(), Clock()
    progress = Progress(10, enabled="off", stream=out, clock=clock)
    run(progress, clock, range(10))
    progress.message("hello")
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("stream", "environment", "mode"),
    [
        (Terminal(), {}, "rich"),
        (io.StringIO(), {}, "plain"),
        (Terminal(), {"CI": "true"}, "plain"),
        (Terminal(), {"CI": "false"}, "rich"),
        (Terminal(), {"TERM": "dumb"}, "plain"),
    ],
)
def test_auto_is_live_only_in_a_real_terminal(monkeypatch, stream, environment, mode):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Progress(1, stream=stream).mode == mode


def test_the_live_display_shows_phase_count_metrics_and_time_left():
    out, clock = Terminal(), Clock()
    with Progress(20, enabled="rich", stream=out, clock=clock) as progress:
        clock.now = 4.0
        progress.update(0, METRICS)
        progress.phase("teacher")
        progress.message("[bold] is not markup")
    shown = out.getvalue()
    for piece in ("1/20", "ETA 1:16", "loss 0.25", "reverse KL 0.125", "12,346", "[bold] is not markup"):
        assert piece in shown
    assert "teacher" in shown


def test_a_metric_that_is_missing_is_not_shown():
    out, clock = io.StringIO(), Clock()
    with Progress(1, enabled="plain", stream=out, clock=clock) as progress:
        progress.update(0, {"loss": float("nan")})
    assert out.getvalue() == "step 1/1  loss nan\n"


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (7.4, "0:07"), (187, "3:07"), (3765, "1:02:45")])
def test_durations_read_like_a_clock(seconds, shown):
    assert duration(seconds) == shown


def test_a_message_cannot_command_the_terminal():
    stream = io.StringIO()
    with Progress(1, enabled="plain", stream=stream) as progress:
        progress.message("warning: role \x1b]0;title\x07 and \u202e")
    assert stream.getvalue() == "warning: role \\x1b]0;title\\x07 and \\u202e\n"


def test_a_sampled_answer_cannot_command_the_terminal_or_leave_its_margin():
    stream = io.StringIO()
    hostile = "\x1b[2J\x1b]0;title\x07\u202eabc\rstep 9/9  loss 0\x9b31m\x08\nsecond line"
    with Progress(1, enabled="plain", stream=stream) as progress:
        progress.sample("step 1: one of 4 sampled answers", hostile, hostile + "x" * 5000)
    shown = stream.getvalue()
    assert not set(shown) & set("\x1b\x07\x08\r\x9b\u202e")
    heading, *quoted = shown.splitlines()
    assert heading == "step 1: one of 4 sampled answers"
    assert {line[:10] for line in quoted} == {"  prompt │", "         │", "  answer │"}
    assert quoted[1] == "         │ second line" and quoted[2].startswith("  answer │ \\x1b[2J")
    assert quoted[-1].endswith(f"… and {len(hostile) + 4000:,} more characters")


@pytest.mark.parametrize("columns", [44, 100])
def test_a_live_sample_is_wrapped_to_the_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = Terminal()
    with Progress(2, enabled="rich", stream=out) as progress:
        progress.update(0, METRICS)
        progress.sample("step 1", "[red]question?[/red]", "answer " * 40)
    lines = re.sub("\x1b[^A-Za-z]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n").split("\n")
    assert max(map(len, lines)) <= columns and any("[red]question?[/red]" in line for line in lines)

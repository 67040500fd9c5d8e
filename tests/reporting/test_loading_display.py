from __future__ import annotations

import io
import re

import pytest

from opd.reporting.loading import Loading


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _ordinary_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def test_a_pipe_gets_a_line_for_every_model():
    out = io.StringIO()
    with Loading(stream=out) as loading:
        loading.begin("loading student 'a\x1b[2J'")
        loading.message("  prompt │ hello")
        loading.begin("loading teacher 'b'", here=False)
    assert out.getvalue() == "loading student 'a\\x1b[2J'\n  prompt │ hello\nloading teacher 'b'\n"


@pytest.mark.parametrize("columns", [44, 100])
def test_a_terminal_shows_the_seconds_so_far_and_keeps_nothing_but_messages(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    now = iter(range(0, 100_000, 75))
    out = Terminal()
    with Loading(stream=out, clock=lambda: float(next(now))) as loading:
        loading.begin("loading student 'm/student'")
        loading.message("stays")
    shown = out.getvalue()
    assert "loading student 'm/student'" in shown and "2:30" in shown
    plain = re.sub("\x1b[^A-Za-z]*[A-Za-z]", "", shown)
    assert max(map(len, re.split("[\r\n]", plain))) <= columns
    assert shown.endswith("\x1b[?25h\r\x1b[1A\x1b[2K")  # the cursor is back, and the line erased
    assert "stays\n" in plain


def test_a_download_keeps_the_terminal_for_its_own_bars():
    out = Terminal()
    with Loading(stream=out) as loading:
        loading.begin("loading student 'owner/name'", here=False)
    assert out.getvalue() == "loading student 'owner/name'\n"


def test_off_prints_nothing():
    out = Terminal()
    with Loading(enabled="off", stream=out) as loading:
        loading.begin("loading student")
        loading.message("hello")
    assert out.getvalue() == ""

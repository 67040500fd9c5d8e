"""A page of a run that goes on follows it: served by `opd watch`, and from the disk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from browser.waiting import until
from opd.reporting import RunRecorder, watch, write_report
from opd.reporting.about import write_state
from opd.reporting.watch import server
from reporting.report_inputs import write_run

CONFIG = "seed: 0\n" * 200


@contextmanager
def served(folder: Path) -> Iterator[str]:
    with server(folder) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{found.server_address[1]}/"
        finally:
            found.shutdown()
            thread.join(60)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = write_run(tmp_path / "run", summary=False)
    (folder / "config.yaml").write_text(CONFIG)
    write_state(folder, "running", 4, 10)
    return folder


def grow(folder: Path, name: str = "running") -> None:
    with RunRecorder(folder, resume_step=4) as recorder:
        recorder.step(4, {"loss": 0.5, "a/new chart": 1.0})
    write_state(folder, name, 5, 10)  # pyright: ignore[reportArgumentType]


def open_the_last_block_and_scroll(page: Any) -> tuple[str, float]:
    """(name of the block, where the page is scrolled to)"""
    name = page.evaluate(
        """() => {
          const block = [...document.querySelectorAll("details")].at(-1);
          block.open = true;
          scrollTo(0, 600);
          window.untouched = true;
          return block.querySelector("summary").textContent.trim();
        }"""
    )
    return name, page.evaluate("scrollY")


def state_of(page: Any) -> tuple[bool, float]:
    last = page.evaluate("[...document.querySelectorAll('details')].at(-1).open")
    return last, page.evaluate("scrollY")


AGAIN = "window.untouched === undefined && document.readyState === 'complete'"


def test_a_served_page_follows_the_run_and_keeps_its_place(run: Path, open_page: Callable[..., Any], monkeypatch):
    monkeypatch.setattr(watch, "EVERY_S", 0.0)
    with served(run) as url:
        page = open_page(url)
        _, scrolled = open_the_last_block_and_scroll(page)
        page.evaluate("location.hash = '#here'")
        page.evaluate("scrollTo(0, 600)")
        assert scrolled == 600
        page.wait_for_timeout(6000)
        assert page.evaluate("window.untouched") is True  # no news, no reload
        place = page.evaluate("scrollY")
        assert place > 300
        grow(run)
        until(page, AGAIN)
        until(page, f"Math.abs(scrollY - {place}) <= 1")
        assert state_of(page)[0] and page.evaluate("location.hash") == "#here"
        assert page.locator("meta[name=opd-version]").get_attribute("content")


def test_a_served_page_waits_while_it_is_in_use(run: Path, open_page: Callable[..., Any], monkeypatch):
    monkeypatch.setattr(watch, "EVERY_S", 0.0)
    with served(run) as url:
        page = open_page(url)
        page.evaluate("window.untouched = true")
        page.evaluate("getSelection().selectAllChildren(document.querySelector('h1'))")
        grow(run)
        page.wait_for_timeout(8000)
        assert page.evaluate("window.untouched") is True
        page.evaluate("getSelection().removeAllRanges()")
        until(page, AGAIN)


def test_a_page_from_the_disk_loads_itself_again_until_the_run_has_ended(run: Path, open_page: Callable[..., Any]):
    page = open_page(write_report(run))
    page.clock.install()
    page.reload()
    open_the_last_block_and_scroll(page)
    grow(run)
    write_report(run)
    page.clock.fast_forward(29_000)
    assert page.evaluate("window.untouched") is True
    page.clock.fast_forward(10_000)
    until(page, AGAIN)
    until(page, "Math.abs(scrollY - 600) <= 1")
    assert state_of(page)[0]
    grow(run, "finished")
    write_report(run)
    page.evaluate("window.untouched = true")
    page.clock.fast_forward(40_000)
    until(page, AGAIN)
    page.evaluate("window.untouched = true")
    page.clock.fast_forward(600_000)
    assert page.evaluate("window.untouched") is True  # a run that has ended stays as it is


def test_a_page_of_a_run_that_has_ended_asks_for_nothing(tmp_path: Path, open_page: Callable[..., Any]):
    text = write_report(write_run(tmp_path / "run")).read_text()
    assert "opd-version" not in text
    page = open_page(tmp_path / "run" / "report.html")
    page.clock.install()
    page.reload()
    page.evaluate("window.untouched = true")
    page.clock.fast_forward(600_000)
    assert page.evaluate("window.untouched") is True

"""The report in a real browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd.reporting import write_report
from reporting.report_inputs import write_run


def test_a_report_opens_without_an_error_or_a_request(tmp_path: Path, open_page: Callable[..., Any]):
    page = open_page(write_report(write_run(tmp_path / "run")))
    assert page.locator("h1").inner_text() == "run"

"""Waiting for a page whose policy forbids playwright's own way to do so."""

from __future__ import annotations

import time
from typing import Any


def until(page: Any, condition: str, seconds: float = 30.0) -> None:
    """Returns once an expression of the page is true; fails after so many seconds. A page that is being loaded is asked again."""
    end = time.monotonic() + seconds
    while True:
        try:
            if page.evaluate(condition):
                return
        except Exception:  # the page went away to be loaded again
            if time.monotonic() > end:
                raise
        assert time.monotonic() < end, f"never: {condition}; the page is scrolled to {page.evaluate('scrollY')}"
        page.wait_for_timeout(50)

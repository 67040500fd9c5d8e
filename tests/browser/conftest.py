"""A real browser, Debian's chromium, that reads pages from the disk.

Without chromium these tests are skipped, and with OPD_BROWSER=required they fail: continuous integration must have one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FOUND = next((path for name in NAMES if (path := shutil.which(name))), None)
DESKTOP = {"width": 1280, "height": 900}

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """playwright's Browser."""
    if FOUND is None:
        said = f"no browser: install one of {', '.join(NAMES)} (Debian: apt-get install chromium)"
        if os.environ.get("OPD_BROWSER") == "required":
            pytest.fail(said)
        pytest.skip(said)
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=FOUND, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a file or the address of a server, `open_page(path, **options of a context)`. The test fails on an exception of the page, on a message of its console
    that is an error, which a breach of its Content-Security-Policy is, and on a request that leaves the file or the server."""
    contexts, wrong = [], []

    def opened(path: Path | str, **options: Any) -> Any:
        url = path if isinstance(path, str) else path.resolve().as_uri()
        own = (url,) if isinstance(path, str) else ("file:",)
        context = browser.new_context(**{"viewport": DESKTOP, "color_scheme": "light", **options})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(f"exception: {error}"))
        page.on(
            "console", lambda message: wrong.append(f"console: {message.text}") if message.type == "error" else None
        )
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on(
            "request",
            lambda asked: None if asked.url.startswith((*own, "data:", "blob:")) else wrong.append(asked.url),
        )
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not wrong, wrong

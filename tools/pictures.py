"""The pictures of docs/images, from real runs, by a real browser.

`python -m tools.pictures --run RUN --text RUN --token sample-36-token-30 --compare RUN RUN … --live RUN --recipe RECIPE.yaml` takes
those that its arguments allow: a report; the token viewer, dark and on a phone too; a comparison; the report of a run that goes on,
half-way; and a terminal in which RECIPE is trained. It needs chromium and the `dev` extra.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.text import Text

from opd.reporting import watch, write_report

OUT = Path("docs/images")
DESKTOP = {"width": 1280, "height": 860}
TALL = {"width": 1280, "height": 1200}
PHONE = {"width": 420, "height": 860}
COLUMNS, LINES = 100, 40
LIVE_EVERY_MS = 2000


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.pictures", description=__doc__)
    parser.add_argument("--run", type=Path, help="a finished run, for the report")
    parser.add_argument("--text", type=Path, help="a finished run, for the token viewer")
    parser.add_argument("--token", default="", help="what of --text is open, as in a link: sample-36-token-30")
    parser.add_argument("--compare", type=Path, nargs="+", default=[], help="runs to compare")
    parser.add_argument("--live", type=Path, help="a run that goes on; the picture is taken half-way")
    parser.add_argument("--recipe", type=Path, help="trained in a terminal of its own folder")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.recipe is not None:
        terminal(args.recipe, args.out / "terminal.svg")
    with sync_playwright() as playwright:
        chromium = next(path for name in ("chromium", "google-chrome") if (path := shutil.which(name)))
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        if args.run is not None:
            report(browser, args.run, args.out)
        if args.text is not None:
            tokens(browser, args.text, args.token, args.out)
        if args.compare:
            compare(browser, args.compare, args.out)
        if args.live is not None:
            live(browser, args.live, args.out)
        browser.close()
    return 0


def report(browser: Any, run: Path, out: Path) -> None:
    """The top of the page, and its charts in the dark."""
    with tempfile.TemporaryDirectory() as folder:
        page = write_report(run, Path(folder) / "report.html")
        shoot(browser, page, out / "report.png", DESKTOP)
        shoot(browser, page, out / "report-dark.png", DESKTOP, before=to_charts, color_scheme="dark")


def to_charts(page: Any) -> None:
    page.locator("#learning").evaluate("e => e.scrollIntoView({ block: 'start', behavior: 'instant' })")


def tokens(browser: Any, run: Path, token: str, out: Path) -> None:
    """The token viewer with a token open, also on a phone."""
    with tempfile.TemporaryDirectory() as folder:
        page = write_report(run, Path(folder) / "report.html")
        shoot(browser, page, out / "tokens.png", TALL, before=to_viewer, place=token)
        shoot(browser, page, out / "tokens-dark.png", TALL, before=to_viewer, place=token, color_scheme="dark")
        shoot(browser, page, out / "phone.png", PHONE, place=token)


def to_viewer(page: Any) -> None:
    page.locator(".viewer-bench").evaluate("e => e.scrollIntoView({ block: 'start', behavior: 'instant' })")


def compare(browser: Any, runs: list[Path], out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "compare.html"
        words = [*map(str, runs), "--out", str(page)]
        subprocess.run([sys.executable, "-m", "opd.cli.main", "compare", *words], check=True, timeout=120)
        shoot(browser, page, out / "compare.png", {"width": 1280, "height": 1250})


def live(browser: Any, run: Path, out: Path) -> None:
    """What `opd watch` shows when half of the steps are done."""
    served = watch.server(run)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    page = browser.new_context(viewport=DESKTOP, device_scale_factor=2).new_page()
    page.goto(f"http://127.0.0.1:{served.server_address[1]}/")
    half = "(() => { const s = JSON.parse(document.getElementById('state').textContent); return s && s.step >= s.steps / 2; })()"
    while not page.evaluate(half):
        page.wait_for_timeout(LIVE_EVERY_MS)
    page.screenshot(path=out / "live.png")
    served.shutdown()


def shoot(
    browser: Any,
    page: Path,
    out: Path,
    viewport: dict[str, int],
    *,
    before: Callable[[Any], None] = lambda _page: None,
    place: str = "",
    **options: Any,
) -> None:
    context = browser.new_context(viewport=viewport, device_scale_factor=2, **options)
    opened = context.new_page()
    opened.goto(page.resolve().as_uri() + (f"#{place}" if place else ""))
    opened.wait_for_timeout(300)
    before(opened)
    opened.wait_for_timeout(400)
    opened.screenshot(path=out)
    context.close()
    print(out)


def terminal(recipe: Path, out: Path) -> None:
    """The last screen of `opd train`, as a terminal shows it while it trains."""
    command = [sys.executable, "-m", "opd.cli.main", "train", recipe.name, "--overwrite"]
    main_end, other_end = pty.openpty()
    size = {"COLUMNS": str(COLUMNS), "LINES": str(LINES), "TERM": "xterm-256color"}
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | size
    process = subprocess.Popen(
        command, cwd=recipe.parent, stdin=other_end, stdout=other_end, stderr=other_end, env=environment
    )
    os.close(other_end)
    said = b""
    while True:
        try:
            piece = os.read(main_end, 1 << 16)
        except OSError:  # the process has ended
            break
        if not piece:
            break
        said += piece
    process.wait(60)
    screen = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"))  # noqa: SIM115
    screen.print(Text("$ opd train " + recipe.name, style="bold"))
    screen.print(Text.from_ansi("\n".join(lines_on_screen(said.decode("utf-8", "replace")))))
    drawn = screen.export_svg(title="opd")
    out.write_text(re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL), encoding="utf-8")  # fonts from elsewhere
    print(out)


def lines_on_screen(text: str) -> list[str]:
    """What stays of a terminal's text when a live display writes over its own lines."""
    lines: list[str] = []
    row = 0
    for piece in text.replace("\x1b[?25l", "").replace("\x1b[?25h", "").replace("\r\n", "\n").split("\n"):
        current = piece
        ups = current.count("\x1b[1A")
        if ups:
            row = max(0, row - ups)
            current = current.rpartition("\x1b[1A")[2]
        current = current.replace("\x1b[2K", "").rpartition("\r")[2]
        lines[row:] = [current]
        row += 1
    return lines


if __name__ == "__main__":
    sys.exit(main())

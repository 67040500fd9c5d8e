"""`opd compare`: two runs or more, side by side, in the terminal and on one page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opd.errors import ConfigError

USAGE = "opd compare RUN RUN … [--out FILE] [--open]"
DEFAULT_OUT = "compare.html"
HELP = f"""usage: {USAGE}

Reads run folders, finished or not, and prints results, paired differences and the keys of the recipes that differ.
Writes the page {DEFAULT_OUT} with the curves on top of each other and the answers to the same prompts side by side.
Runs of one recipe that differ in their seed are one group: its curves are the mean, with a band from the lowest to the highest seed.

--out FILE   another place for the page; a file that is not an earlier comparison is never overwritten
--open       show the page in the browser
"""


@dataclass(frozen=True, kw_only=True)
class Words:
    """The command line, read."""

    runs: tuple[str, ...]
    out: Path
    open: bool


def run(args: Sequence[str]) -> int:
    if "-h" in args or "--help" in args:
        print(HELP, end="")
        return 0
    words = _read(args)
    from rich.console import Console

    from opd.cli.defaults import recipe_defaults
    from opd.reporting.compare import compare
    from opd.reporting.compare_page import check_place, write_page
    from opd.reporting.compare_words import plain_text, terminal
    from opd.reporting.runs import grouped, read_runs

    check_place(words.out)
    comparison = compare(grouped(read_runs(words.runs)), recipe_defaults())
    place = write_page(comparison, words.out)
    console = Console()
    if console.is_terminal:
        console.print(terminal(comparison, console.width))
    else:
        print(plain_text(comparison))
    print(f"page: {place}")
    if words.open:
        _open(place)
    return 0


def _read(args: Sequence[str]) -> Words:
    runs: list[str] = []
    out, shown, rest = DEFAULT_OUT, False, list(args)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name == "--out":
            if not equals:
                if not rest or rest[0].startswith("--"):
                    raise ConfigError(f"--out needs a file, e.g. --out {DEFAULT_OUT}.")
                value = rest.pop(0)
            if not value:
                raise ConfigError(f"--out is empty; name a file, e.g. --out {DEFAULT_OUT}.")
            out = value
        elif word == "--open":
            shown = True
        elif word.startswith("-"):
            raise ConfigError(f"opd compare has no option '{word}'. Usage: {USAGE}")
        else:
            runs.append(word)
    if len(runs) < 2:
        what = "no run was given" if not runs else f"'{runs[0]}' has nothing to be compared with"
        raise ConfigError(f"Give two run folders or more, {what}. Usage: {USAGE}")
    return Words(runs=tuple(runs), out=Path(out), open=shown)


def _open(place: Path) -> None:
    import webbrowser

    if not webbrowser.open(place.resolve().as_uri()):
        print("note: no browser was found here; open the page by hand.", file=sys.stderr)

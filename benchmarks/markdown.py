"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

END = "<!-- end -->\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> str:
    """A Markdown table. `numbers` aligns every column but the first to the right."""
    rule = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def put_between(page: Path, start: str, text: str) -> None:
    """Replace what stands between the mark `start` and the next END in a page."""
    before, rest = page.read_text(encoding="utf-8").split(start)
    after = rest.split(END, 1)[1]
    page.write_text(f"{before}{start}\n{text}\n{END}{after}", encoding="utf-8")

"""What a text marks as its answer: the last \\boxed{}, or the last <answer> tag."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?P<bare>[^\s{}$\\]+))")
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def last_box(text: str) -> str | None:
    """Content of the last closed box that is not empty."""
    boxes = list(_BOX.finditer(text))
    closed = _closing_braces(text) if boxes else {}
    for match in reversed(boxes):
        held = match["bare"] if match["bare"] is not None else text[match.end() : closed.get(match.end() - 1, 0)]
        if held.strip():
            return held
    return None


def last_tag(text: str) -> str | None:
    """Content of the last closed <answer> tag, without the white space around it."""
    found = _TAG.findall(text)
    return found[-1].strip() if found else None


def _closing_braces(text: str) -> dict[int, int]:
    """Position of the closing brace by that of its opening brace."""
    opened: list[int] = []
    closed: dict[int, int] = {}
    for place, character in enumerate(text):
        if character == "{":
            opened.append(place)
        elif character == "}" and opened:
            closed[opened.pop()] = place
    return closed

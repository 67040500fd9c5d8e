"""The colours of tokens, and their text with nothing invisible left.

The scales are fixed, so that a colour means the same in every report. Colours grow darker (light page) or brighter (dark page)
with the amount, and text has a contrast of at least 4.5:1 (WCAG 2.2, AA). Lightness alone tells the levels of a scale apart, so
they survive colour blindness and grey printing; the scale with two ends is blue and orange, which colour-blind readers tell apart.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from itertools import pairwise

KL_EDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Nats; level i holds KL_EDGES[i−1] ≤ KL < KL_EDGES[i]."""
ENTROPY_EDGES = (0.05, 0.2, 0.5, 1.0, 2.0, 3.0)
"""Nats."""
DIFFERENCE_EDGES = (-3.0, -1.0, -0.2, 0.2, 1.0, 3.0)
"""Nats, of the teacher's log-prob minus the student's."""
SHARE_EDGES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Of the tokens of a response: the share with a lower KL."""

# (background, text) per level; level 0 is the card itself.
LIGHT_SCALE = (
    ("#ffffff", "#1f2328"),
    ("#fff4d6", "#1f2328"),
    ("#ffe1a1", "#1f2328"),
    ("#fdbd61", "#1f2328"),
    ("#f0913a", "#1f2328"),
    ("#b8480f", "#ffffff"),
    ("#701f05", "#ffffff"),
)
DARK_SCALE = (
    ("#161b22", "#e6edf3"),
    ("#2d2412", "#e6edf3"),
    ("#4a3611", "#f3ecdf"),
    ("#6b4710", "#fff6e6"),
    ("#8f5a0c", "#ffffff"),
    ("#dd922b", "#161b22"),
    ("#ffd899", "#161b22"),
)
LIGHT_ENTROPY = (
    ("#ffffff", "#1f2328"),
    ("#f3effc", "#1f2328"),
    ("#e2d8f8", "#1f2328"),
    ("#cbb7f1", "#1f2328"),
    ("#ad8ee6", "#1f2328"),
    ("#7141c0", "#ffffff"),
    ("#3f1a80", "#ffffff"),
)
DARK_ENTROPY = (
    ("#161b22", "#e6edf3"),
    ("#241f3b", "#e6edf3"),
    ("#382c62", "#efeafc"),
    ("#4f3c8c", "#f6f2ff"),
    ("#6c53b8", "#ffffff"),
    ("#a98cf0", "#161b22"),
    ("#dccffc", "#161b22"),
)
# From "the teacher likes it less" (orange) to "the teacher likes it more" (blue); level 3 is the card itself.
LIGHT_DIFFERENCE = (
    ("#b8480f", "#ffffff"),
    ("#f6a45c", "#1f2328"),
    ("#ffe1bd", "#1f2328"),
    ("#ffffff", "#1f2328"),
    ("#cfe4fb", "#1f2328"),
    ("#84b9ef", "#1f2328"),
    ("#0b5cb5", "#ffffff"),
)
DARK_DIFFERENCE = (
    ("#f0a04b", "#161b22"),
    ("#94590f", "#ffffff"),
    ("#49310f", "#f3ecdf"),
    ("#161b22", "#e6edf3"),
    ("#12335a", "#e6edf3"),
    ("#1f62ad", "#ffffff"),
    ("#79b8ff", "#161b22"),
)

NEWLINE, SPACE, TAB, EMPTY, NO_BASE = "↵", "·", "→", "∅", "◌"

# Invisible characters that are part of a picture: joiners between two, and the tags of a flag.
_EMOJI = r"[\u00a9\u00ae\u2190-\u2bff\u3030\u303d\u3297\u3299\U0001f000-\U0001faff]"
_PICTURES = re.compile(
    rf"{_EMOJI}[\ufe0f\U0001f3fb-\U0001f3ff]*(?:\u200d{_EMOJI}[\ufe0f\U0001f3fb-\U0001f3ff]*)+"
    r"|\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f"
)
# Control, format (bidirectional overrides, zero widths), surrogate and unassigned characters would hide or disorder text.
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))


def level_labels(edges: Sequence[float]) -> list[str]:
    """The legend of a scale: one label per level."""
    words = [f"{edge:g}".replace("-", "−") for edge in edges]
    return [f"< {words[0]}", *(f"{low} – {high}" for low, high in pairwise(words)), f"≥ {words[-1]}"]


def visible(token: str) -> str:
    """`token` with nothing invisible left: "\\n" → "↵\\n", "\\t" → "→\\t", and "·" for spaces other than one before a word."""
    if not token:
        return EMPTY
    body = token[1:] if token[0] == " " and token[1:2].strip() else token
    first = token[: len(token) - len(body)]
    return first + _on_a_base(_marked(body, _visible_character))


def readable(text: str) -> str:
    """A whole text, whose spaces, tabs and line ends stay as they are, and whose other invisible characters are shown by their codes."""
    return _on_a_base(_marked(text, _readable_character))


def scale_css(scale: Sequence[tuple[str, str]], name: str = "kl") -> str:
    """The scale as CSS custom properties, `--kl-0` … and `--kl-0-ink` …."""
    return "".join(f"--{name}-{i}:{back};--{name}-{i}-ink:{ink};" for i, (back, ink) in enumerate(scale))


def _marked(text: str, mark: Callable[[str], str]) -> str:
    """`text` with `mark` made of each character outside pictures, which stay whole."""
    parts, end = [], 0
    for picture in _PICTURES.finditer(text):
        parts += [*map(mark, text[end : picture.start()]), picture.group()]
        end = picture.end()
    return "".join([*parts, *map(mark, text[end:])])


def _on_a_base(text: str) -> str:
    """A combining character that comes first gets a base of its own, and so does not join what stands before it."""
    return NO_BASE + text if text and unicodedata.category(text[0]) in ("Mn", "Mc", "Me") else text


def _visible_character(character: str) -> str:
    marks = {"\n": NEWLINE + "\n", "\t": TAB + "\t", " ": SPACE}
    if character in marks:
        return marks[character]
    return _code(character) if unicodedata.category(character) in (*_HIDDEN, "Zs") else character


def _readable_character(character: str) -> str:
    keep = character in "\n\t" or unicodedata.category(character) not in _HIDDEN
    return character if keep else _code(character)


def _code(character: str) -> str:
    return f"⟨U+{ord(character):04X}⟩"

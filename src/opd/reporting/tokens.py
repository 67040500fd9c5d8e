"""Responses, token by token, coloured by reverse KL.

The scale is fixed, so that a colour means the same in every report: each level is about three times the KL of the one
before. Colours grow darker (light page) or brighter (dark page) with KL, and text has a contrast of at least 4.5:1
(WCAG 2.2, AA). Lightness alone tells the levels apart, so they survive colour blindness and grey printing.
"""

from __future__ import annotations

import bisect
import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from opd.reporting.record import SampleRecord

KL_EDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Nats; level i holds KL_EDGES[i−1] ≤ KL < KL_EDGES[i]."""

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

MAX_TOKENS_SHOWN = 600  # per response
MAX_PAIRS = 6

NEWLINE, SPACE, TAB, EMPTY = "↵", "·", "→", "∅"


@dataclass(frozen=True, kw_only=True)
class ColouredToken:
    text: str
    """Printed text; whitespace and control characters are replaced by visible marks."""
    level: int | None
    """Colour level; None where no KL is known."""
    hover: str


@dataclass(frozen=True, kw_only=True)
class SamplePair:
    """Responses to one prompt: the student's early and late in the run, and the teacher's."""

    late: SampleRecord
    early: SampleRecord | None = None
    teacher: SampleRecord | None = None


def kl_level(kl: float) -> int | None:
    """Index of the colour for `kl` nats: 0 below 0.01, 6 from 3 nats on; None for NaN."""
    return None if math.isnan(kl) else bisect.bisect_right(KL_EDGES, kl)


def level_labels() -> list[str]:
    """The legend: one label per level."""
    edges = [f"{edge:g}" for edge in KL_EDGES]
    between = [f"{low} – {high}" for low, high in pairwise(edges)]
    return [f"< {edges[0]}", *between, f"≥ {edges[-1]}"]


def coloured_tokens(sample: SampleRecord, limit: int = MAX_TOKENS_SHOWN) -> list[ColouredToken]:
    """The first `limit` tokens of a response."""
    kls: Sequence[float] = sample.reverse_kl if sample.reverse_kl is not None else [math.nan] * len(sample.tokens)
    return [_coloured(token, kl) for token, kl in zip(sample.tokens[:limit], kls, strict=False)]


def visible(token: str) -> str:
    """`token` with nothing invisible left: "\\n" → "↵\\n", "\\t" → "→\\t", and "·" for spaces other than one before a word."""
    if not token:
        return EMPTY
    body = token[1:] if token[0] == " " and token[1:2].strip() else token
    first = token[: len(token) - len(body)]
    return first + "".join(_visible_character(character) for character in body)


def scale_css(scale: Sequence[tuple[str, str]]) -> str:
    """The scale as CSS custom properties, `--kl-0` … and `--kl-0-ink` …."""
    return "".join(f"--kl-{i}:{back};--kl-{i}-ink:{ink};" for i, (back, ink) in enumerate(scale))


def mean_kl(sample: SampleRecord) -> float | None:
    """Mean reverse KL per token, where it is known."""
    known = [kl for kl in sample.reverse_kl or () if math.isfinite(kl)]
    return sum(known) / len(known) if known else None


def pair_samples(samples: Iterable[SampleRecord], limit: int = MAX_PAIRS) -> list[SamplePair]:
    """The first prompts of the file that the student answered twice, as (first, last) answers; then the rest.

    Evaluation prompts come before training prompts, because every evaluation asks the same ones. Prompts are taken in
    the order written, never by how well they turned out.
    """
    by_prompt: dict[tuple[str, int | str], dict[str, list[SampleRecord]]] = {}
    for sample in samples:
        author = sample.who if sample.source == "student" or sample.who == "teacher" else sample.source
        # Student and teacher may read other words for one row.
        row = sample.prompt if sample.prompt_index is None else sample.prompt_index
        by_prompt.setdefault((sample.phase, row), {}).setdefault(author, []).append(sample)
    pairs = [pair for (_, _), by_author in by_prompt.items() if (pair := _pair(by_author))]
    pairs.sort(key=lambda pair: (pair.early is None, pair.late.phase != "eval"))
    has_answers_twice = any(pair.early for pair in pairs)
    if has_answers_twice:
        return pairs[:limit]
    return _first_against_last(pairs, limit)


def _pair(by_author: dict[str, list[SampleRecord]]) -> SamplePair | None:
    teacher = by_author.get("teacher", [None])[-1]
    own = sorted(by_author.get("student", ()), key=lambda sample: sample.step)
    if not own:
        return SamplePair(late=teacher) if teacher is not None else None
    # The first sample of a step stands for it when a prompt was sampled several times.
    late = next(sample for sample in own if sample.step == own[-1].step)
    return SamplePair(late=late, early=own[0] if own[0].step < late.step else None, teacher=teacher)


def _first_against_last(pairs: list[SamplePair], limit: int) -> list[SamplePair]:
    """The samples of the first step beside those of the last, for a run that asked no prompt twice."""
    if not pairs:
        return []
    first, last = min(pair.late.step for pair in pairs), max(pair.late.step for pair in pairs)
    if first == last:
        return pairs[:limit]
    early = [pair.late for pair in pairs if pair.late.step == first]
    late = [pair for pair in pairs if pair.late.step == last]
    return [
        SamplePair(late=pair.late, early=before, teacher=pair.teacher)
        for before, pair in zip(early[:limit], late[:limit], strict=False)
    ]


def _coloured(token: str, kl: float) -> ColouredToken:
    text = visible(token)
    amount = "no KL recorded" if math.isnan(kl) else f"{kl:.3g} nats"
    return ColouredToken(text=text, level=kl_level(kl), hover=f"“{text.replace(chr(10), '')}”  {amount}")


def _visible_character(character: str) -> str:
    if character == "\n":
        return NEWLINE + "\n"
    if character == "\t":
        return TAB + "\t"
    if character == " ":
        return SPACE
    # Control, format (bidirectional overrides, zero widths), surrogate and unassigned characters would hide or disorder text.
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"):
        return f"⟨U+{ord(character):04X}⟩"
    return character

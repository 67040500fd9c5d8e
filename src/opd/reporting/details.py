"""Views of tokens as a record holds them: text, and one entry per response token.

`student_…` is None in answers of the teacher, because nobody asks the student about them; `teacher_…` is None where teachers' losses are
added, because there is no one distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from opd.reporting.record import TokenDetails, TopTokens
from opd.types import TokenViews

if TYPE_CHECKING:
    from torch import Tensor

Strings = Callable[[Sequence[int]], Sequence[str]]
"""The readable text of each token id."""


def token_details(
    views: TokenViews | None, length: int, sampler_logp: Sequence[float] | None, strings: Strings
) -> TokenDetails | None:
    """Both models' say about a response of `length` tokens; NaN and no likeliest tokens where a token was left out. None where nobody said
    anything."""
    if views is None:
        return None if sampler_logp is None else TokenDetails(sampler_logp=sampler_logp)
    places = views.positions.tolist()
    found: dict[str, Sequence[float]] = {}
    tops: dict[str, TopTokens] = {}
    for who, view in (("student", views.student), ("teacher", views.teacher)):
        columns = {"logp": view.logp, "entropy": view.entropy}
        found |= {f"{who}_{name}": _placed(c, places, length) for name, c in columns.items() if c is not None}
        if view.top_ids is not None and view.top_probabilities is not None:
            tops[f"{who}_top"] = _top_tokens(view.top_ids, view.top_probabilities, places, length, strings)
    return TokenDetails(sampler_logp=sampler_logp, **found, **tops)  # pyright: ignore[reportArgumentType]


def _placed(values: Tensor, places: Sequence[int], length: int) -> tuple[float, ...]:
    placed = [math.nan] * length
    for place, value in zip(places, values.tolist(), strict=True):
        placed[place] = value
    return tuple(placed)


def _top_tokens(ids: Tensor, probabilities: Tensor, places: Sequence[int], length: int, strings: Strings) -> TopTokens:
    """A token of probability 0 is none of the likeliest, as in a vocabulary of four."""
    tokens: list[Sequence[str]] = [()] * length
    likely: list[Sequence[float]] = [()] * length
    for place, row, values in zip(places, ids.tolist(), probabilities.tolist(), strict=True):
        count = sum(value > 0 for value in values)
        tokens[place] = tuple(strings(row[:count]))
        likely[place] = tuple(values[:count])
    return TopTokens(tokens=tokens, probabilities=likely)

"""The row passes' surroundings in the patch: one rank has all columns, both models come as logits, and the divergence is all there is.

These stand in for what the package has for output layers, vocabularies that are split over ranks, and terms of a few tokens.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor


class Shards:
    """All columns of the vocabulary, on this rank: sums over ranks are sums already."""

    alone = True
    offset = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def sum(self, *parts: Tensor) -> tuple[Tensor, ...]:
        return parts

    def top(self, logits: Tensor, nothing: float) -> Tensor:
        """Each row's maximum, [rows, 1]; of no columns, `nothing`."""
        return logits.amax(-1, keepdim=True) if logits.shape[1] else logits.new_full((len(logits), 1), nothing)

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return ids, torch.ones_like(ids, dtype=torch.bool)

    def pick(self, logits: Tensor, ids: Tensor) -> Tensor:
        return logits.gather(-1, ids)

    def add_at(self, logits: Tensor, ids: Tensor, values: Tensor) -> None:
        logits.scatter_add_(-1, ids, values)

    def gather_columns(self, logits: Tensor) -> Tensor:
        return logits

    def own_columns(self, rows: Tensor) -> Tensor:
        return rows


class OutputLayer:
    """Of a teacher that comes as hidden states."""

    def __init__(self, *_given: Any, **_named: Any) -> None:
        absent()

    def logits(self, *_given: Any) -> NoReturn:
        absent()


class FewTokenRows:
    """The row pass of terms that read a few tokens; the sum of several losses has one in reserve."""

    keeps_state = shifted = False

    def __init__(self, *_given: Any) -> None:
        pass

    def __call__(self, *_given: Any, **_named: Any) -> NoReturn:
        absent()


def absent(*_given: Any) -> NoReturn:
    """What no loss of the patch comes to: verl has the policy loss, and teachers come as logits."""
    raise NotImplementedError("the patch compares whole logits; the package opd has this.")

"""Rows of a batch of prompts that one of several ranks draws, with the tokens that the whole batch would have given them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LogitsProcessor

from opd.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows `start` to `stop` of a batch, which one rank draws."""

    start: int
    stop: int
    batch: range
    """All rows of the batch."""


def parts_of(rows: int, batch_size: int, ranks: Ranks) -> list[Part]:
    """What this rank draws of `rows` prompts: whole batches in turn; those that are left, fewer than there are ranks, are split."""
    batches = [range(start, min(start + batch_size, rows)) for start in range(0, rows, batch_size)]
    whole = len(batches) // ranks.world * ranks.world
    parts = [Part(start=b.start, stop=b.stop, batch=b) for b in batches[ranks.rank : whole : ranks.world]]
    for batch in batches[whole:]:
        cuts = [batch.start + len(batch) * rank // ranks.world for rank in (ranks.rank, ranks.rank + 1)]
        parts += [Part(start=cuts[0], stop=cuts[1], batch=batch)] if cuts[0] < cuts[1] else []
    return parts


class Share(LogitsProcessor):
    """Draws the tokens of some rows of a batch with the random numbers that they have in the whole batch, and leaves no other token a
    probability: so the rollouts are the same however ranks divide a batch."""

    def __init__(self, part: Part, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.partial = len(part.batch) > part.stop - part.start
        self.rows = slice(part.start - part.batch.start, part.stop - part.batch.start)
        self.size = len(part.batch)
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        whole = torch.ones(self.size, scores.shape[-1], dtype=scores.dtype, device=scores.device)
        whole[self.rows] = scores.softmax(-1)
        drawn = torch.multinomial(whole, 1, generator=self.generator)[self.rows]
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn, 0.0)

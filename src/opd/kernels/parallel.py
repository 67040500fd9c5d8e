"""The vocabulary's columns: how many take part, which are masked, and how they are split over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


class Shards:
    """Columns [offset, offset + size) of the vocabulary are on this rank; without a group, all of them, and nothing is sent."""

    def __init__(self, size: int, group: Any = None) -> None:
        self.group = group
        self.size = size
        self.sizes = [size]
        self.offset = 0
        if group is not None:
            everyone: list[int] = [0] * dist.get_world_size(group)
            dist.all_gather_object(everyone, size, group=group)
            self.sizes = everyone
            self.offset = sum(everyone[: dist.get_rank(group)])

    @property
    def alone(self) -> bool:
        return self.group is None

    @property
    def vocab(self) -> int:
        """Columns of all shards."""
        return sum(self.sizes)

    def sum(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Each tensor added over the ranks, in one message."""
        return self._reduce(parts, dist.ReduceOp.SUM)

    def max(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """The maximum of each tensor over the ranks, in one message."""
        return self._reduce(parts, dist.ReduceOp.MAX)

    def top(self, logits: Tensor, nothing: float) -> Tensor:
        """Each row's maximum over all ranks, [rows, 1]; a rank without columns contributes `nothing`."""
        here = logits.amax(-1, keepdim=True) if logits.shape[1] else logits.new_full((len(logits), 1), nothing)
        return self.max(here)[0]

    def _reduce(self, parts: tuple[Tensor, ...], operation: Any) -> tuple[Tensor, ...]:
        if self.group is None:
            return parts
        message = torch.stack([part.contiguous() for part in parts])
        dist.all_reduce(message, op=operation, group=self.group)
        return message.unbind(0)

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Column numbers on this rank (0 where the id lives elsewhere), and whether the id lives here."""
        if self.group is None:
            return ids, torch.ones_like(ids, dtype=torch.bool)
        moved = ids - self.offset
        here = (moved >= 0) & (moved < self.size)
        return torch.where(here, moved, 0), here

    def pick(self, logits: Tensor, ids: Tensor) -> Tensor:
        """logits[row, ids[row]] wherever the columns are; ids are [rows, k]."""
        if self.group is None:
            return logits.gather(-1, ids)
        column, here = self.local(ids)
        own = torch.where(here, logits.gather(-1, column), 0.0) if self.size else logits.new_zeros(ids.shape)
        return self.sum(own)[0]

    def add_at(self, logits: Tensor, ids: Tensor, values: Tensor) -> None:
        """logits[row, ids[row]] += values, in place, on the rank that has the column."""
        if not logits.shape[-1]:
            return
        column, here = self.local(ids)
        logits.scatter_add_(-1, column, values if self.alone else torch.where(here, values, 0.0))

    def gather_columns(self, logits: Tensor) -> Tensor:
        """The whole rows [rows, vocab] on every rank."""
        if self.group is None:
            return logits
        widest = max(self.sizes)
        padded = logits.new_zeros(logits.shape[0], widest)
        padded[:, : self.size] = logits
        everyone = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(everyone, padded, group=self.group)
        return torch.cat([part[:, :size] for part, size in zip(everyone, self.sizes, strict=True)], dim=-1)

    def own_columns(self, rows: Tensor) -> Tensor:
        """This rank's part of whole rows."""
        return rows[:, self.offset : self.offset + self.size]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The vocabulary entries that a row of logits has."""

    vocab: int
    """Entries that exist on both sides, of all shards together; those beyond are padding."""
    masked_ids: tuple[int, ...] = ()
    """Entries below `vocab` that no token owns."""
    shards: Shards

    @classmethod
    def whole(cls, vocab: int, masked_ids: tuple[int, ...] = ()) -> Columns:
        """All of them on one rank."""
        return cls(vocab=vocab, masked_ids=masked_ids, shards=Shards(vocab))

    @property
    def here(self) -> int:
        """Columns of the logits on this rank: all of a shard, or those below `vocab`."""
        return self.vocab if self.shards.alone else self.shards.size

    def masked(self, device: torch.device) -> Tensor:
        """This rank's column numbers that must have probability 0, of both models: masked ids and padding."""
        column, mine = self.shards.local(torch.tensor(self.masked_ids, dtype=torch.long, device=device))
        first = min(self.here, max(0, self.vocab - self.shards.offset))
        return torch.cat([column[mine & (column < first)], torch.arange(first, self.here, device=device)])

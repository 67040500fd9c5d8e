"""The numbers under `actor/opd/`: means over the response tokens of a whole mini-batch, whatever micro-batches and ranks it was cut into."""

# pyright: reportMissingImports=false
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from opd.integrations.verl.plugin.alignment import ResponseTokens

OF_THE_TOKEN = ("student_logp", "teacher_logp")
"""Metrics that are about the response token itself, which has to be a token of both models."""
POSITIONS = (0, 16, 64, 256, 1024, 4096)
"""First positions of the buckets of a response in which the reverse KL is told apart."""


class MetricSums:
    """Sums and counts of one mini-batch."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, values: Tensor) -> None:
        """One number per token."""
        if len(values):
            held = self.sums.setdefault(name, [0.0, 0])
            held[0] += float(values.sum(dtype=torch.float64))
            held[1] += len(values)

    def add_total(self, name: str, value: Tensor) -> None:
        """A sum that is divided already, by what verl's aggregation divides by."""
        held = self.sums.setdefault(name, [0.0, math.nan])
        held[0] += float(value.detach())

    def add_count(self, name: str, where: Tensor) -> None:
        """A number of tokens of the whole mini-batch."""
        self.counts[name] = self.counts.get(name, 0) + int(where.sum())

    def add_diagnostics(self, diagnostics: dict[str, Tensor], tokens: ResponseTokens) -> None:
        """The diagnostics of one micro-batch."""
        for name, value in diagnostics.items():
            self.add(name, value[tokens.known] if name in OF_THE_TOKEN else value)
        kl = diagnostics.get("reverse_kl")
        if kl is None:
            return
        for first, end in zip(POSITIONS, (*POSITIONS[1:], None), strict=True):
            here = tokens.position >= first
            if end is not None:
                here &= tokens.position < end
            self.add(f"reverse_kl_at/{f'{first}-{end - 1}' if end else f'{first}+'}", kl[here])

    def means(self, group: Any) -> dict[str, float]:
        """The means over all ranks of the group. A collective: every rank calls it."""
        ranks: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(ranks, (self.sums, self.counts), group=group)
        everyone: list[dict[str, list[float]]] = [sums for sums, _ in ranks]
        names = dict.fromkeys(name for _, counts in ranks for name in counts)
        found = {name: float(sum(counts.get(name, 0) for _, counts in ranks)) for name in names}
        for name in dict.fromkeys(name for sums in everyone for name in sums):
            parts = [sums[name] for sums in everyone if name in sums]
            total, count = (sum(part[i] for part in parts) for i in range(2))
            # totals hold the factor by which verl undoes the mean over ranks that follows a backward pass
            found[name] = total / len(everyone) if math.isnan(count) else total / count
        if "teacher_logp" in found:
            found["teacher_perplexity"] = math.exp(min(700.0, -found["teacher_logp"]))
        return found

"""The numbers of one update: its weights λ, means over a whole mini-batch under `actor/opd/`, and traces to compute losses again from."""

# pyright: reportMissingImports=false
from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist

from opd.integrations.verl.plugin.alignment import ResponseTokens
from opd.integrations.verl.plugin.settings import Settings
from opd.losses import NO_SPREAD
from opd.trainer.metrics import repetition

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

    def add_responses(
        self, micro_batch: Any, tokens: ResponseTokens, eos_ids: Collection[int], limit: int | None
    ) -> None:
        """Length, repetition and, where the `limit` of a response is known, whether it was cut off there; one number per response.

        Responses without a token that counts fill up a batch, and are left out.
        """
        offsets = micro_batch["input_ids"].offsets().tolist()
        values = micro_batch["input_ids"].values()
        lengths: list[float] = []
        repeated: list[float] = []
        cut: list[float] = []
        sequences, firsts = tokens.sequence_index.tolist(), (tokens.packed_index - tokens.position + 1).tolist()
        for sequence, first in dict(zip(sequences, firsts, strict=True)).items():
            ids = values[first : offsets[sequence + 1]].tolist()
            lengths.append(len(ids))
            repeated.append(repetition(ids))
            cut.append(limit is not None and len(ids) >= limit and ids[-1] not in eos_ids)
        self.add("response_length", torch.tensor(lengths))
        self.add("repetition", torch.tensor(repeated))
        if limit is not None:
            self.add("truncated", torch.tensor(cut, dtype=torch.float64))

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


class Weights(NamedTuple):
    """The weights of one update."""

    rl: float
    distill: float

    @property
    def mixed(self) -> bool:
        return self.rl > 0 and self.distill > 0


def scheduled(settings: Settings, engine: Any) -> Weights:
    """The weights of the coming update. verl's learning-rate scheduler counts the trainer's steps, and is part of its checkpoints."""
    if settings.rl.weight_end is None and settings.rl.distill_weight_end is None:
        return Weights(settings.rl.weight, settings.rl.distill_weight)
    step, steps = engine.lr_scheduler.last_epoch, engine.optimizer_config.total_training_steps
    return Weights(*settings.rl.weights_at(step, steps))


class Spread(MetricSums):
    """The standard deviations of both terms over the response tokens of a mini-batch, however it is cut."""

    def add_terms(self, advantages: Tensor, term: Tensor) -> None:
        """One number per token each: verl's advantage, minus which its policy loss is at ratio 1, and the distillation's loss."""
        for name, values in (("rl", advantages.double()), ("distill", term.detach().double())):
            self.add(name, values)
            self.add(f"{name} squared", values.square())

    def stds(self, group: Any) -> tuple[float, float]:
        """(of the advantages, of the distillation), over all ranks of the group; every rank has to ask."""
        found = {"rl": 0.0, "distill": 0.0, "rl squared": 0.0, "distill squared": 0.0} | self.means(group)
        rl, distill = (math.sqrt(max(0.0, found[f"{n} squared"] - found[n] ** 2)) for n in ("rl", "distill"))
        return rl, distill


def matched(weights: Weights, stds: tuple[float, float]) -> Weights:
    """Both terms divided by their standard deviation; one that has none keeps its size (opd.losses.match_scale)."""
    rl, distill = (std if std > NO_SPREAD else 1.0 for std in stds)
    return Weights(weights.rl / rl, weights.distill / distill)


def write_trace(
    folder: str, rank: int, number: int, input_ids: Tensor, tokens: ResponseTokens, per_token: Tensor
) -> None:
    """`rank<r>_<n>.safetensors`: sequences one after the other with their offsets; of each response token that counted, the
    position before it, its weight and its loss."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        "input_ids": input_ids.values(),
        "offsets": input_ids.offsets(),  # pyright: ignore[reportAttributeAccessIssue]
        "predict_index": tokens.packed_index,
        "weights": tokens.weights,
        "loss": per_token,
    }
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path / f"rank{rank}_{number:06d}.safetensors"
    )

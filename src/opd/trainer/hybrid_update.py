"""Hybrid updates: batch-wide standard deviations and advantages that are needed before the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from opd.losses import NO_SPREAD, Hybrid, TokenLoss, combine_advantages
from opd.ranks import ALONE, Ranks
from opd.types import Batch

LossOf = Callable[[Batch, Hybrid], tuple[torch.Tensor, TokenLoss]]


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Inputs of the update after the preview pass."""

    batches: Sequence[Batch]
    objective: Hybrid
    losses: Sequence[tuple[Batch, TokenLoss]]
    """The distillation term of every micro-batch, without gradient."""
    metrics: dict[str, float]


@torch.no_grad()
def preview(loss_of: LossOf, batches: Sequence[Batch], hybrid: Hybrid, ranks: Ranks = ALONE) -> Preview:
    """The distillation term over the whole batch, before the update: its spread, and the advantages that it delivers.

    The spread is that of all micro-batches of all ranks together, so that how they are cut changes nothing.
    """
    # Seen from the student itself the ratio is 1 and cannot be clipped: the loss is −advantage.
    alone = Hybrid(distill=replace(hybrid.distill, clip_range=None))
    # Whole logits are not kept: `batches` may make them anew when they are used.
    losses = [(replace(batch, target=None), loss_of(replace(batch, sampler_logp=None), alone)[1]) for batch in batches]
    counted = [batch.token_weights != 0 for batch, _ in losses]
    distill = _spread([out.loss[kept] for (_, out), kept in zip(losses, counted, strict=True)], ranks)
    rl = _spread([_advantages(batch)[kept] for (batch, _), kept in zip(losses, counted, strict=True)], ranks)
    metrics = {"rl/advantage_std": rl, "rl/distill_std": distill}
    if hybrid.combine == "losses":
        objective = replace(
            hybrid,
            scale="none",
            rl_weight=hybrid.rl_weight / _divisor(rl),
            distill_weight=hybrid.distill_weight / _divisor(distill),
        )
        return Preview(batches=batches, objective=objective, losses=losses, metrics=metrics)
    joined = [
        replace(
            batch,
            advantages=combine_advantages(
                _advantages(batch),
                -out.loss,
                rl_weight=hybrid.rl_weight,
                distill_weight=hybrid.distill_weight,
                scale=hybrid.scale,
                rl_std=rl,
                distill_std=distill,
            ),
        )
        for batch, out in losses
    ]
    return Preview(
        batches=joined,
        objective=replace(hybrid, scale="none", rl_weight=1.0, distill_weight=0.0),
        losses=losses,
        metrics=metrics,
    )


def _advantages(batch: Batch) -> torch.Tensor:
    assert batch.advantages is not None
    return batch.advantages


def _divisor(spread: float) -> float:
    """As `match_scale` divides: a term without a spread keeps its size."""
    return spread if spread > NO_SPREAD else 1.0


def _spread(parts: Sequence[torch.Tensor], ranks: Ranks) -> float:
    own = torch.cat([part.double() for part in parts] or [torch.empty(0, dtype=torch.float64)])
    values = own if ranks.alone else torch.cat([torch.from_numpy(v) for v in ranks.gather(own.cpu().numpy())])
    return float(values.std(correction=0)) if len(values) else 0.0

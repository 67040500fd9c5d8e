"""The one place where per-token losses become a number: Σ weight · loss, with a *global* count in the weight.

Because the count is that of the whole batch, one batch of 8, eight of 1, and two ranks of 4 give the same sum.
"""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from opd.errors import ObjectiveError
from opd.losses._shapes import Bool, Float, Int
from opd.losses.choices import Reduction


def token_weights(
    sequence_index: Int[Tensor, " tokens"],
    lengths: Int[Tensor, " sequences"],
    *,
    reduction: Reduction = "token_mean",
    global_count: float | int,
    mask: Bool[Tensor, " tokens"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, " tokens"]:
    """The factor of each token's loss; 0 where `mask` is False.

    token_mean: 1/N, N the counted tokens of the global batch. sequence_mean: 1/(n_s · S), n_s the counted tokens of the
    token's sequence (`lengths`) and S the sequences of the global batch. fixed: 1/C, a constant. `global_count` is N, S or C.
    """
    if reduction not in get_args(Reduction):
        raise ObjectiveError(f"reduction={reduction!r} is not one of {', '.join(get_args(Reduction))}.")
    if not (global_count > 0 and math.isfinite(global_count)):
        raise ObjectiveError(
            f"global_count={global_count}: nothing to divide by. Count the response tokens (token_mean) or the sequences "
            "(sequence_mean) of the whole batch, over all ranks, before splitting it."
        )
    weights = torch.full(sequence_index.shape, 1.0 / global_count, dtype=dtype, device=sequence_index.device)
    if reduction == "sequence_mean":
        weights = weights / lengths.to(dtype)[sequence_index].clamp(min=1)
    return weights if mask is None else torch.where(mask, weights, 0.0)


def weighted_sum(per_token: Float[Tensor, " tokens"], weights: Float[Tensor, " tokens"]) -> Float[Tensor, ""]:
    """Σ weight · loss. A token of weight 0 is left out even if its loss is NaN or infinite."""
    return (torch.where(weights == 0, 0.0, per_token) * weights).sum()

"""log Σ e^z of rows whose sums are in the middle of float32's range, without the pass that finds the maximum.

The student's rows and a teacher's log-probs go through the same sums, so that the same logits give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd.losses._shapes import Bool, Float

SAFE_SUM = (1e-10, 1e20)  # far from both ends of float32, so that products of two sums still fit
CPU_PIECE = 1 << 16  # entries of float32: four buffers of 256 KiB stay in a core's second-level cache
GPU_PIECE = 1 << 24  # 64 MiB


def rows_together(z: Tensor) -> int:
    """Rows that are worked on at a time."""
    return max(1, (GPU_PIECE if z.is_cuda else CPU_PIECE) // max(1, z.shape[1]))


def pieces(z: Tensor) -> list[slice]:
    """The rows, some at a time."""
    rows = rows_together(z)
    return [slice(first, min(first + rows, z.shape[0])) for first in range(0, z.shape[0], rows)]


def out_of_range(sums: Float[Tensor, "rows k"]) -> Bool[Tensor, " rows"]:
    """True where one of a row's sums has left the range; NaN counts as outside."""
    low, high = SAFE_SUM
    return ~((sums > low) & (sums < high)).all(-1)


def log_probs(z: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
    """log softmax(z) by the sums of the fused row pass; by `log_softmax` where they are out_of_range."""
    sums = torch.cat([z.new_empty(0, 1), *(z[piece].exp().sum(-1, keepdim=True) for piece in pieces(z))])
    logp = z - sums.log()
    outside = out_of_range(sums)
    if bool(outside.any()):
        logp[outside] = torch.log_softmax(z[outside], dim=-1)
    return logp

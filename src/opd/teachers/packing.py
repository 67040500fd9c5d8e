"""Does a model keep packed sequences apart? A few tokens through the model itself tell, whatever its architecture is called.

Attention tells sequences apart by their positions. Recurrent and convolutional layers (Gated DeltaNet, Mamba, LFM2's short
convolutions) do so only when they are told where a sequence starts, and some attention never does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

FIRST, ANOTHER_FIRST = (1, 5, 3, 2, 4, 1, 3), (4, 2, 5, 3, 1, 5, 2)
SECOND, ANOTHER_SECOND = (2, 4, 1, 5, 3, 2, 4, 4, 1), (5, 3, 3, 1, 2, 4, 1, 2, 5)
LEAST_LEAK = 1e-4
"""Of a token's spread. In one shape, what another sequence holds changes nothing, but for the rounding of experts' groups,"""
ROUNDING_FACTOR = 3.0
"""which is measured where nothing can leak; a leak is so many times that."""
SHIFTED = 0.1
"""Of a token's spread, between a sequence behind another one and alone: bfloat16 rounding stays far under it, a wrong position does not."""


@torch.no_grad()
def mixes_packed(read: Callable[[Sequence[Sequence[int]]], Float[Tensor, "tokens width"]]) -> bool:
    """True when packed sequences change each other's outputs.

    `read` gives the logits, or other outputs, of sequences of token ids (1 to 5) that are packed one behind the other. A causal
    model's first sequence cannot see the second, so what changes there with another second sequence is rounding.
    """
    border = len(FIRST)
    together = read([FIRST, SECOND])
    leak = _apart(together[border:], read([ANOTHER_FIRST, SECOND])[border:])
    rounding = _apart(together[:border], read([FIRST, ANOTHER_SECOND])[:border])
    shifted = _apart(together[border:], read([SECOND]))
    return leak > max(LEAST_LEAK, ROUNDING_FACTOR * rounding) or shifted > SHIFTED


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest distance of a token's two outputs, in units of its spread."""
    one, other = one.float(), other.float()
    spread = (one - one.mean(-1, keepdim=True)).norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return float(((one - other).norm(dim=-1) / spread).max())

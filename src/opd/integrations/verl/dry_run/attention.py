"""Attention of a sequence that ranks share, without flash-attn: what verl's own patch does around that library, around PyTorch's attention.

`actor_rollout_ref.model.override_config.attn_implementation=ulysses_sdpa` picks it; verl cuts the sequences as on a GPU.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from transformers import AttentionInterface, AttentionMaskInterface
from verl.utils.ulysses import (
    gather_heads_scatter_seq,
    gather_seq_scatter_heads,
    get_ulysses_sequence_parallel_group,
)

NAME = "ulysses_sdpa"


def register() -> None:
    """Make the name known to transformers."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _no_mask)


def attend(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Any,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    **_rest: Any,
) -> tuple[Tensor, None]:
    """[1, heads, positions / ranks, width] each, to [1, positions / ranks, heads, width]. A position id of 0 starts a sequence."""
    assert position_ids is not None, f"{NAME} is for packed sequences (use_remove_padding=true)"
    group = get_ulysses_sequence_parallel_group()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if group is not None:
        query, key, value = (
            gather_seq_scatter_heads(x, seq_dim=2, head_dim=1, group=group) for x in (query, key, value)
        )
        parts = [torch.empty_like(position_ids) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, position_ids.contiguous(), group=group)
        position_ids = torch.cat(parts, dim=-1)
    sequence = (position_ids[0] == 0).cumsum(0)
    earlier = torch.ones(len(sequence), len(sequence), dtype=torch.bool, device=query.device).tril()
    seen = earlier & (sequence[:, None] == sequence[None, :])
    out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    if group is not None:
        out = gather_heads_scatter_seq(out, head_dim=1, seq_dim=2, group=group)
    return out.transpose(1, 2).contiguous(), None


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """`attend` makes its own, because a rank's positions do not show where sequences start elsewhere."""

"""The specification of an output layer, from what a caller passes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from opd.kernels.checks import check_chunk, common_vocabulary
from opd.kernels.head import GradsNeeded, HeadSpec
from opd.kernels.parallel import Columns, Shards
from opd.types import AnyTarget

Memory = Literal["fast", "minimal"]

CPU_CHUNK_BYTES = 75 << 20  # of one logits buffer: 128 rows of 152k columns; with fewer the products lose speed
CPU_CHUNK_ROWS = 256  # more gain nothing on a CPU (benchmarks/LOG.md), unless rows are so short that calls cost more:
CPU_CACHED_BYTES = 4 << 20
GPU_CHUNK_BYTES = 640 << 20  # 1024 rows of 152k columns: fewer rows re-read dW too often, more cost memory
MAX_CHUNK = 8192
MINIMAL_CHUNK = 1024


def head_spec(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: AnyTarget | None = None,
    *,
    token_weights: Tensor | None = None,
    valid_vocab: int | None = None,
    masked_ids: tuple[int, ...] = (),
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    memory: Memory = "fast",
    group: Any = None,
) -> HeadSpec:
    """Detached, over the columns that the student and `target` share. Raises ObjectiveError where there are none."""
    shards = Shards(weight.shape[0], group)
    if token_weights is None:
        token_weights = torch.ones(hidden.shape[:1], device=hidden.device)
    head = HeadSpec(
        hidden=hidden.detach(),
        weight=weight.detach(),
        bias=None if bias is None else bias.detach(),
        columns=Columns(vocab=common_vocabulary(shards, target, valid_vocab), masked_ids=masked_ids, shards=shards),
        token_weights=token_weights.detach().to(torch.promote_types(hidden.dtype, torch.float32)),
        temperature=temperature,
        needs=grads_needed(hidden, weight, bias),
        chunk_tokens=chunk_tokens if chunk_tokens is not None else default_chunk(hidden, shards.size, memory),
    )
    check_chunk(head.chunk_tokens)
    return head


def default_chunk(hidden: Tensor, columns: int, memory: Memory) -> int:
    """Tokens per chunk: as many as fit the device's budget, and on a CPU no more than pay."""
    if memory == "minimal":
        return MINIMAL_CHUNK
    row = max(1, columns) * (8 if hidden.dtype == torch.float64 else 4)
    if hidden.is_cuda:
        return max(64, min(MAX_CHUNK, GPU_CHUNK_BYTES // row // 64 * 64))
    useful = max(CPU_CHUNK_ROWS, CPU_CACHED_BYTES // row)
    return max(16, min(MAX_CHUNK, useful, CPU_CHUNK_BYTES // row // 16 * 16))


def unshard(weight: Tensor) -> Tensor:
    """A DTensor's whole value. Ranks work on tokens of their own, so its gradient is the sum over them."""
    if not hasattr(weight, "full_tensor"):
        return weight
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(weight, DTensor)
    return weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)


def grads_needed(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> GradsNeeded:
    on = torch.is_grad_enabled()
    return GradsNeeded(
        hidden=on and hidden.requires_grad,
        weight=on and weight.requires_grad,
        bias=on and bias is not None and bias.requires_grad,
    )

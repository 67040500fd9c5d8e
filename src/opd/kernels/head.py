"""The matrix products: logits in float32 whatever the operands, and the gradients of the operands, accumulated in float32.

Operands of 16 bits stay 16 bits on CUDA, where a product can write float32 (`out_dtype`). Elsewhere the weight is widened a
few rows at a time, which rounds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from opd.kernels.checks import check_chunk, common_vocabulary
from opd.kernels.row_spec import Columns, Shards
from opd.losses._shapes import Float
from opd.types import AnyTarget

Memory = Literal["fast", "minimal"]

CPU_CHUNK_BYTES = 75 << 20  # of one logits buffer: 128 rows of 152k columns; with fewer the products lose speed
CPU_CHUNK_ROWS = 256  # more gain nothing on a CPU (benchmarks/LOG.md), unless rows are so short that calls cost more:
CPU_CACHED_BYTES = 4 << 20
GPU_CHUNK_BYTES = 640 << 20  # 1024 rows of 152k columns: fewer rows re-read dW too often, more cost memory
MAX_CHUNK = 8192
MINIMAL_CHUNK = 1024
ROW_MULTIPLE = 8  # products of other heights leave part of a vector register idle
WIDENED_ENTRIES = 1 << 20  # weight entries that are widened at a time: 4 MiB of float32


@dataclass(frozen=True, kw_only=True)
class GradsNeeded:
    """The gradients that are wanted; a product that feeds none of them is not run."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """logits = (hidden @ weight.T + bias) / temperature over `columns`, and the gradient of Σ token_weights · loss."""

    hidden: Float[Tensor, "tokens hidden"]
    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None
    columns: Columns
    token_weights: Float[Tensor, " tokens"]
    temperature: float = 1.0
    needs: GradsNeeded = GradsNeeded()
    chunk_tokens: int

    @property
    def dtype(self) -> torch.dtype:
        """Of logits, divergences and accumulated gradients."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0]

    def at(self, index: Tensor) -> HeadSpec:
        """The specification at some of its tokens."""
        return replace(self, hidden=self.hidden[index], token_weights=self.token_weights[index])


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
    shards, on = Shards(weight.shape[0], group), torch.is_grad_enabled()
    if token_weights is None:
        token_weights = torch.ones(hidden.shape[:1], device=hidden.device)
    head = HeadSpec(
        hidden=hidden.detach(),
        weight=weight.detach(),
        bias=None if bias is None else bias.detach(),
        columns=Columns(vocab=common_vocabulary(shards, target, valid_vocab), masked_ids=masked_ids, shards=shards),
        token_weights=token_weights.detach().to(torch.promote_types(hidden.dtype, torch.float32)),
        temperature=temperature,
        needs=GradsNeeded(
            hidden=on and hidden.requires_grad,
            weight=on and weight.requires_grad,
            bias=on and bias is not None and bias.requires_grad,
        ),
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


class HeadLogits:
    """Logits of hidden states, and where d(loss)/d(logits) goes: through the gradient products, into their sums."""

    def __init__(self, head: HeadSpec) -> None:
        self.head = head
        self.layer = OutputLayer(
            head.weight, head.bias, columns=head.columns, dtype=head.dtype, temperature=head.temperature
        )
        chunks = max(1, math.ceil(head.tokens / head.chunk_tokens))
        even = math.ceil(max(1, math.ceil(head.tokens / chunks)) / ROW_MULTIPLE) * ROW_MULTIPLE
        self.chunk = min(head.chunk_tokens, head.tokens or 1, even)
        needs, blank = head.needs, {"dtype": head.dtype, "device": head.hidden.device}
        self.wants_gradient = needs.any
        self.hidden_grad = torch.empty(head.hidden.shape, **blank) if needs.hidden else None
        self.weight_grad = torch.empty(head.weight.shape, **blank) if needs.weight else None
        if self.weight_grad is not None:
            self.weight_grad[self.layer.columns if head.tokens else 0 :].zero_()
        self.bias_grad = torch.zeros(len(head.weight), **blank) if needs.bias else None
        self._weight_is_written = False

    def buffer(self) -> Tensor:
        """Room for the logits of a chunk."""
        return torch.empty(self.chunk, self.layer.columns, dtype=self.head.dtype, device=self.head.hidden.device)

    def chunks(self, rows: int | None = None) -> Iterator[slice]:
        """The tokens, `rows` at a time; by default in as few chunks as can be, even in size."""
        rows = rows or self.chunk
        for first in range(0, self.head.tokens, rows):
            yield slice(first, min(first + rows, self.head.tokens))

    def logits(self, index: slice | Tensor, out: Tensor, fill: float) -> Tensor:
        """Logits of some tokens into `out`; masked columns are `fill`."""
        return self.layer.logits(self.head.hidden[index], out, fill)

    def add_gradient(self, gradient: Tensor, scale: Tensor, rows: slice) -> None:
        """Take `gradient` · scale, which is d(loss per token)/d(logits / temperature) of these rows."""
        head, columns = self.head, self.layer.columns
        scale = (scale * head.token_weights[rows] / head.temperature).unsqueeze(-1)
        if self.layer.rounds_to_half:
            scale = scale / lifted(gradient)
        if self.bias_grad is not None:
            self.bias_grad[:columns] += torch.mv(gradient.T, scale.squeeze(-1))
        if self.hidden_grad is not None:
            out = self.hidden_grad[rows]
            self.layer.hidden_grad(gradient, out)
            out.mul_(scale)
        if self.weight_grad is not None:
            scaled = head.hidden[rows].to(head.dtype) * scale
            self.layer.weight_grad(gradient, scaled, self.weight_grad[:columns], accumulate=self._weight_is_written)
            self._weight_is_written = True

    def add_block_gradient(self, gradient: Tensor, rows: slice, first: int) -> None:
        """Take d(loss)/d(logits), token weights included, of the columns from `first` on; `hidden_grad` must begin as zeros."""
        last = first + gradient.shape[1]
        if self.bias_grad is not None:
            self.bias_grad[first:last] += gradient.sum(0)
        if self.hidden_grad is not None:
            self.layer.hidden_grad(gradient, self.hidden_grad[rows], first, accumulate=True)
        if self.weight_grad is not None:
            hidden = self.head.hidden[rows].to(self.head.dtype)
            self.layer.weight_grad(gradient, hidden, self.weight_grad[first:last], accumulate=rows.start > 0)
            self._weight_is_written = True

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden states (summed over shards), weight and bias, as they were accumulated."""
        hidden = self.hidden_grad
        if hidden is not None:
            (hidden,) = self.head.columns.shards.sum(hidden)
        return hidden, self.weight_grad, self.bias_grad


class OutputLayer:
    """hidden @ weight.T + bias over the columns that both models have."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, columns: Columns, dtype: torch.dtype, temperature: float
    ) -> None:
        """`temperature` divides the logits (through the hidden rows, which are fewer)."""
        self.columns = columns.here
        self.weight = weight[: self.columns]
        self.dtype = dtype
        self.temperature = temperature
        self.bias = None if bias is None else bias[: self.columns].to(dtype) / temperature
        self.masked = columns.masked(weight.device)
        self.same = weight.dtype == dtype
        self.mixed = not self.same and weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)
        self.step = max(1, WIDENED_ENTRIES // max(1, weight.shape[1]))

    @property
    def rounds_to_half(self) -> bool:
        """True if d(logits) is rounded to float16 on its way through the gradient products."""
        return self.mixed and self.weight.dtype == torch.float16

    def logits(self, hidden: Tensor, out: Tensor, fill: float, first: int = 0) -> Tensor:
        """Logits of columns [first, first + out's width) into `out` [rows, width]; masked columns are `fill`."""
        last = first + out.shape[1]
        weight = self.weight[first:last]
        if self.mixed:
            torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=torch.float32, out=out)  # pyright: ignore[reportCallIssue]
            if self.temperature != 1.0:
                out.div_(self.temperature)
        else:
            hidden = hidden.to(self.dtype)
            if self.temperature != 1.0:
                hidden = hidden / self.temperature
            if self.same:
                torch.mm(hidden, weight.T, out=out)
            else:
                for a in range(0, weight.shape[0], self.step):
                    torch.mm(hidden, weight[a : a + self.step].to(self.dtype).T, out=out[:, a : a + self.step])
        if self.bias is not None:
            out.add_(self.bias[first:last])
        return mask_columns(out, self.masked, fill, first, self.columns)

    def hidden_grad(self, gradient: Tensor, out: Tensor, first: int = 0, accumulate: bool = False) -> None:
        """out (+)= gradient @ weight, [rows, hidden] in float32."""
        weight = self.weight[first : first + gradient.shape[1]]
        if self.same:
            torch.addmm(out, gradient, weight, beta=int(accumulate), out=out)
        elif self.mixed:
            product = torch.mm(gradient.to(weight.dtype), weight, out_dtype=torch.float32)  # pyright: ignore[reportCallIssue]
            out.copy_(out + product if accumulate else product)
        else:
            if not accumulate:
                out.zero_()
            for a in range(0, weight.shape[0], self.step):
                out.addmm_(gradient[:, a : a + self.step], weight[a : a + self.step].to(out.dtype))

    def weight_grad(self, gradient: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None:
        """out (+)= gradient.T @ hidden, [columns, hidden] in float32; `hidden` is float32 already."""
        if self.mixed:
            left, right = gradient.to(self.weight.dtype).T, hidden.to(self.weight.dtype)
            torch.addmm(out, left, right, beta=int(accumulate), out_dtype=torch.float32, out=out)  # pyright: ignore[reportCallIssue]
        else:
            torch.addmm(out, gradient.T, hidden, beta=int(accumulate), out=out)


def mask_columns(out: Tensor, masked: Tensor, fill: float, first: int, columns: int) -> Tensor:
    """Set those of the `masked` columns that are among [first, first + out's width) of all `columns`, in place."""
    if masked.numel():
        if out.shape[1] < columns:
            masked = masked[(masked >= first) & (masked < first + out.shape[1])] - first
        out.index_fill_(-1, masked, fill)
    return out


def lifted(gradient: Tensor) -> Tensor:
    """Each row times a power of two, in place, that brings its largest entry near 2^10, and these powers: float16 holds no number
    below 6e-8, and most of a row of a large vocabulary is."""
    top = torch.frexp(torch.linalg.vector_norm(gradient, math.inf, dim=-1, keepdim=True))
    power = torch.where(top.mantissa.isfinite(), torch.exp2((10 - top.exponent).to(gradient.dtype)), 1.0)
    gradient.mul_(power)
    return power


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Products of float32 in float32, whatever PyTorch has been told (TF32 keeps 10 of 23 bits, and so would the logits)."""
    backends: Any = torch.backends
    backend = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
    told = backend.fp32_precision
    if told in ("none", "ieee") and backends.fp32_precision in ("none", "ieee"):
        yield
        return
    # PyTorch has two settings that must agree: the one that was used is the one that is changed and put back.
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:
        legacy = None
    if legacy in (None, "highest"):
        backend.fp32_precision = "ieee"
    else:
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if legacy in (None, "highest"):
            backend.fp32_precision = told
        else:
            torch.set_float32_matmul_precision(legacy)

"""The student's side of the matrix products: its logits a chunk of tokens at a time, and the gradients of its operands."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd.kernels.output_layer import OutputLayer, lifted
from opd.kernels.parallel import Columns
from opd.losses._shapes import Float

ROW_MULTIPLE = 8  # products of other heights leave part of a vector register idle


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


class HeadLogits:
    """Logits of hidden states, and where d(loss)/d(logits) goes: through the gradient products, into their sums."""

    def __init__(self, head: HeadSpec) -> None:
        columns = head.columns.here
        self.head = head
        self.layer = OutputLayer(
            head.weight[:columns],
            None if head.bias is None else head.bias[:columns],
            dtype=head.dtype,
            temperature=head.temperature,
            masked=head.columns.masked(head.hidden.device),
        )
        chunks = max(1, math.ceil(head.tokens / head.chunk_tokens))
        even = math.ceil(max(1, math.ceil(head.tokens / chunks)) / ROW_MULTIPLE) * ROW_MULTIPLE
        self.chunk = min(head.chunk_tokens, head.tokens or 1, even)
        self.wants_gradient = head.needs.any
        self.hidden_grad, self.weight_grad, self.bias_grad = self._accumulators()
        self._weight_is_written = False

    def _accumulators(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        head, needs = self.head, self.head.needs
        blank = {"dtype": head.dtype, "device": head.hidden.device}
        hidden = torch.empty(head.hidden.shape, **blank) if needs.hidden else None
        weight = torch.empty(head.weight.shape, **blank) if needs.weight else None
        if weight is not None:
            weight[self.layer.columns if head.tokens else 0 :].zero_()
        return hidden, weight, torch.zeros(len(head.weight), **blank) if needs.bias else None

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

"""The matrix products: logits in float32 whatever the operands, gradients accumulated in float32.

Operands of 16 bits stay 16 bits on CUDA, where a product can write float32 (`out_dtype`). Elsewhere the weight is widened a
few rows at a time, which rounds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

WIDENED_ENTRIES = 1 << 20  # weight entries that are widened at a time: 4 MiB of float32


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


class OutputLayer:
    """hidden @ weight.T + bias over the columns that both models have."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype, temperature: float = 1.0, masked: Tensor
    ) -> None:
        """`masked` holds column numbers; `temperature` divides the logits (through the hidden rows, which are fewer)."""
        self.weight = weight
        self.dtype = dtype
        self.temperature = temperature
        self.bias = None if bias is None else bias.to(dtype) / temperature
        self.masked = masked
        self.same = weight.dtype == dtype
        self.mixed = not self.same and weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)
        self.step = max(1, WIDENED_ENTRIES // max(1, weight.shape[1]))

    @property
    def columns(self) -> int:
        return self.weight.shape[0]

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

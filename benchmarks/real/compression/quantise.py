"""Weights in 4 bits with one scale per row, by torchao: as training sees them (fake-quantised), and really rounded."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

BITS = 4


class OncePerUpdate(nn.Module):
    """A fake quantiser whose result is kept while no gradient is asked for and the weight stays the same.

    Sampling asks for it at every token, and rounding 106 million weights takes as long as a token does."""

    def __init__(self, quantiser: nn.Module) -> None:
        super().__init__()
        self.quantiser = quantiser
        self._kept: tuple[int, Tensor] | None = None

    def forward(self, weight: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self._kept = None
            return self.quantiser(weight)
        if self._kept is None or self._kept[0] != weight._version:  # optimizers write in place, which counts it up
            self._kept = weight._version, self.quantiser(weight)
        return self._kept[1]


def fake_quantise(model: Any) -> None:
    """Let every linear layer of the decoder's blocks multiply with its rounded weight; gradients pass to the weight that is rounded
    (straight through). Embeddings and output layer stay as they are."""
    from torchao.quantization import quantize_  # pyright: ignore[reportMissingImports]

    quantize_(model, _step("prepare"), filter_fn=_in_a_block)
    for _, layer in fake_layers(model):
        layer.weight_fake_quantizer = OncePerUpdate(layer.weight_fake_quantizer)


def rounded(model: Any) -> Any:
    """A copy of a fake-quantised model whose layers hold the rounded weights and nothing else; the copy's function is the same."""
    from torchao.quantization import quantize_  # pyright: ignore[reportMissingImports]

    made = copy.deepcopy(model)
    names = [name for name, _ in fake_layers(made)]
    for _, layer in fake_layers(made):
        layer.weight_fake_quantizer = layer.weight_fake_quantizer.quantiser
    quantize_(made, _step("convert"), filter_fn=_in_a_block)
    for name in names:
        layer = made.get_submodule(name)
        whole = layer.weight.dequantize()
        _check_levels(name, layer.weight.qdata)
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=whole.dtype)
        plain.weight.data = whole.detach()
        plain.bias = layer.bias
        parent, _, last = name.rpartition(".")
        setattr(made.get_submodule(parent), last, plain)
    return made.eval()


def fake_layers(model: Any) -> list[tuple[str, Any]]:
    """The layers that fake_quantise has changed, by name."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "weight_fake_quantizer")]


def _step(step: str) -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis  # pyright: ignore[reportMissingImports]
    from torchao.quantization.qat import QATConfig  # pyright: ignore[reportMissingImports]

    return QATConfig(IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{BITS}"), granularity=PerAxis(0)), step=step)


def _in_a_block(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and ".layers." in f".{name}"


def _check_levels(name: str, integers: Tensor) -> None:
    """The weight of a layer is made of 4-bit integers."""
    low, high = int(integers.min()), int(integers.max())
    assert low >= -(2 ** (BITS - 1)) and high < 2 ** (BITS - 1), (name, low, high)

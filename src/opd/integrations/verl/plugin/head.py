"""A model's output layer: work inside its forward pass, where FSDP2 holds the layer whole and logits need not be made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opd.errors import ModelError
from opd.types import Head

PROBE = 100.0
"""One more value in place of the logits. Losses are too near 0 to show a soft-cap; this value shows it."""


def output_layer(module: nn.Module, role: str) -> nn.Linear:
    """The layer that makes logits. Raises ModelError unless it is a plain matrix."""
    layer = module.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    if not isinstance(layer, nn.Linear):
        raise ModelError(
            f"The {role}'s output layer is a {type(layer).__name__}, not a linear layer, so its logits are not a product of hidden "
            "states. If it carries a LoRA adapter, leave it out of actor_rollout_ref.model.target_modules."
        )
    return layer


def head_of(layer: nn.Linear, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Head:
    """The layer's weight and bias without gradients. `device` and `dtype` are for the weight; a bias keeps its dtype."""
    weight = layer.weight.detach().to(device=device, dtype=dtype)
    return Head(weight=weight, bias=None if layer.bias is None else layer.bias.detach().to(device=device))


def hidden_states(module: nn.Module, inputs: Mapping[str, Any], index: Tensor | None, role: str) -> Tensor:
    """The states that enter the output layer, [positions, hidden]: those at `index`, or all. No logits are made."""
    kept: list[Tensor] = []

    def keep(hidden: Tensor, _layer: nn.Linear) -> Tensor:
        kept.append(hidden if index is None else hidden.index_select(0, index))
        return hidden.new_zeros(0, dtype=torch.float32)

    run_to_head(module, inputs, keep, role)
    return kept[0]


def run_to_head(
    module: nn.Module, inputs: Mapping[str, Any], at_head: Callable[[Tensor, nn.Linear], Tensor], role: str
) -> Tensor:
    """Run the model, call `at_head(hidden [positions, hidden], layer)` where its logits would be made, return its float32 numbers.

    The value travels through the model's own output, so that autograd and FSDP2's hooks, which gather the weights again for
    the backward pass, see it. Raises ModelError for a model that does something to its logits (a soft-cap, a scale) or that
    never comes to its output layer.
    """
    layer = output_layer(module, role)
    hidden: list[Tensor] = []
    made: list[Tensor] = []

    def enter(_layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden.append(args[0])
        return (args[0][:, :1], *args[1:])  # the product of one position, thrown away

    def leave(_layer: nn.Module, _args: tuple[Any, ...], _output: Tensor) -> Tensor:
        values = at_head(hidden.pop().flatten(0, 1), layer)
        made.append(torch.cat([values, values.new_full((1,), PROBE)]))
        return made[0].view(1, 1, -1).clone()  # FSDP2 does not want a view

    # FSDP2's own hooks on the layer gather its weight before `enter` and free it after `leave`.
    handles = [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave, prepend=True)]
    try:
        logits = module(**inputs, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    if not made:
        raise ModelError(
            f"The {role} never ran its output layer: something replaced its forward pass (fused kernels?), so there are no hidden states "
            "to take. Switch that off; model.use_fused_kernels must be false."
        )
    found, given = logits.detach().flatten(), made[0].detach()
    # To the bit, where NaN is NaN: a loss that is NaN is somebody else's error.
    if found.numel() != given.numel() or not ((found == given) | (found.isnan() & given.isnan())).all():
        raise ModelError(
            f"The {role} changes its logits after the output layer (a soft-cap or a scale), so hidden states alone do not give them. "
            "Use a model without that; verl with opd's patch (opd verl patch --help) and opd's own trainer take such models from whole "
            "logits."
        )
    return logits.flatten()[:-1]

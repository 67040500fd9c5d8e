"""Keys and values of a batch that is generated: kept in one buffer per layer, and attended to without a copy for every head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from opd.models import base_model

GROUPED = "opd_grouped_sdpa"
ROOM = 64  # tokens that a buffer grows by at least; it grows by a quarter of its length where that is more


class BufferedLayer(DynamicLayer):
    """Keys and values [rows, heads, tokens, head_dim] as views of buffers with room for more: a token is written, and nothing else is
    copied. transformers' own layer copies all of them for every token."""

    def __init__(self, most: int) -> None:
        """`most` tokens are kept at most; buffers grow no further."""
        super().__init__()
        self.most = most
        self.buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self.buffers is None or end > self.buffers[0].shape[-2]:
            room = max(end, min(self.most, end + max(ROOM, end // 4)))
            self.buffers = (self._grown(self.keys, key_states, room), self._grown(self.values, value_states, room))
        keys, values = self.buffers
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows alone, in this order."""
        super().batch_select_indices(indices)
        self.buffers = None

    def _grown(self, kept: torch.Tensor | None, new: torch.Tensor, room: int) -> torch.Tensor:
        buffer = new.new_empty(*new.shape[:-2], room, new.shape[-1])
        if kept is not None and kept.numel():
            buffer[:, :, : kept.shape[-2]] = kept
        return buffer


def selectable_cache(model: PreTrainedModel, most: int) -> Cache | None:
    """An empty cache for `most` tokens from which rows can be taken out; None for models that keep more than keys and values."""
    inner = base_model(model)  # peft's own forward takes whatever the model's takes
    if model.config.is_encoder_decoder or "past_key_values" not in signature(inner.forward).parameters:
        return None
    usual = DynamicCache(config=model.config.get_text_config(decoder=True))
    kinds = {type(layer) for layer in usual.layers}
    if not kinds or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return None
    usual.layers = [BufferedLayer(most) if type(layer) is DynamicLayer else layer for layer in usual.layers]
    return usual


@contextmanager
def grouped_attention(model: PreTrainedModel) -> Iterator[None]:
    """While one token per row passes a model on a CPU, query heads that share keys and values are rows of one product.
    transformers' "sdpa" repeats keys and values for each of them there. Other attention, and other devices, are left alone."""
    inner = base_model(model)
    alone = model.config.get_text_config(decoder=True) is model.config
    if model.device.type != "cpu" or not alone or inner.config._attn_implementation != "sdpa":
        yield
        return
    inner.set_attn_implementation(GROUPED)
    try:
        yield
    finally:
        inner.set_attn_implementation("sdpa")


def _grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`query` is [rows, heads, tokens, head_dim], `key` and `value` have fewer heads. The result is [rows, tokens, heads, head_dim]."""
    rows, heads, tokens, size = query.shape
    groups = key.shape[1]
    if tokens != 1 or groups == heads or dropout or (attention_mask is not None and attention_mask.shape[1] != 1):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    together = query.view(rows, groups, heads // groups, size)
    found = scaled_dot_product_attention(together, key, value, attn_mask=attention_mask, scale=scaling)
    return found.reshape(rows, 1, heads, value.shape[-1]), None


AttentionInterface.register(GROUPED, _grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)

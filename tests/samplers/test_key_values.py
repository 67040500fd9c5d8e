"""Buffers hold what transformers' own cache holds, and grouped attention gives what sdpa gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.mixing_models import tiny
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from opd.samplers.key_values import GROUPED, ROOM, BufferedLayer, grouped_attention, selectable_cache


def states(tokens: int, rows: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed + tokens)
    return torch.randn(rows, 2, tokens, 4, generator=source), torch.randn(rows, 2, tokens, 6, generator=source)


def test_a_buffer_holds_what_transformers_own_layer_holds():
    """Prompts, single tokens past several enlargements, rows that leave and come twice, and a cut."""
    ours: Any = BufferedLayer(10_000)
    theirs: Any = DynamicLayer()
    rows = 3
    for step, tokens in enumerate([5, *[1] * (ROOM + 3), 2 * ROOM, 1, 1]):
        given = states(tokens, rows, seed=step)
        for ours_part, theirs_part in zip(ours.update(*given), theirs.update(*given), strict=True):
            assert torch.equal(ours_part, theirs_part)
        if step in (2, ROOM):
            chosen = torch.tensor([2, 0, 0, 1] if step == 2 else [1, 3])
            ours.batch_select_indices(chosen)
            theirs.batch_select_indices(chosen)
            rows = len(chosen)
        if step == 4:
            ours.crop(6)
            theirs.crop(6)
        assert ours.get_seq_length() == theirs.get_seq_length() and torch.equal(ours.values, theirs.values)


def test_a_token_is_written_without_a_copy_of_the_others():
    layer: Any = BufferedLayer(10_000)
    layer.update(*states(5))
    place = layer.keys.data_ptr()
    for _ in range(ROOM):
        layer.update(*states(1))
    assert layer.keys.data_ptr() == place
    layer.update(*states(1))
    assert layer.keys.data_ptr() != place, "the buffer is full and a larger one takes its place"


def test_a_buffer_has_no_more_room_than_the_longest_row_takes():
    layer = BufferedLayer(8)
    layer.update(*states(5))
    assert layer.buffers is not None and layer.buffers[0].shape[-2] == 8
    layer.update(*states(4))  # more than was said
    assert layer.buffers[0].shape[-2] == 9


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("tokens", [1, 3])
def test_grouped_attention_is_sdpa(masked: bool, tokens: int):
    module: Any = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True
    source = torch.Generator().manual_seed(0)
    query = torch.randn(2, tokens, 6, 4, generator=source).transpose(1, 2)
    key, value = (torch.randn(2, 2, 5, 4, generator=source) for _ in range(2))
    mask = torch.rand(2, 1, tokens, 5, generator=source) < 0.6 if masked else None
    if mask is not None:
        mask[..., -1] = True
    grouped = AttentionInterface()[GROUPED]
    found, _ = grouped(module, query, key, value, mask, scaling=0.3)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, expected)


def test_a_model_has_its_own_attention_again_after_sampling():
    model = tiny("llama", 13)
    seen = []

    def fail(*_: object) -> None:
        seen.append(model.config._attn_implementation)
        raise KeyError

    model.register_forward_pre_hook(fail)
    with pytest.raises(KeyError), grouped_attention(model):
        model(torch.tensor([[1]]))
    assert seen == [GROUPED]
    assert model.config._attn_implementation == "sdpa"


def test_attention_that_was_asked_for_is_left_alone():
    model = tiny("llama", 13)
    model.set_attn_implementation("eager")
    with grouped_attention(model):
        assert model.config._attn_implementation == "eager"


def test_only_layers_that_keep_every_token_have_buffers():
    cache = selectable_cache(tiny("gemma3_text", 13), 9)
    assert cache is not None
    kinds = {type(layer).__name__ for layer in cache.layers}
    assert "DynamicSlidingWindowLayer" in kinds and "DynamicLayer" not in kinds

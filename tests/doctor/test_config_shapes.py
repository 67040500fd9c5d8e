"""The shapes of well-known decoders from their config alone, against transformers' own models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from opd.doctor.config_shapes import PLAIN, config_shapes

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 100,
}


@pytest.mark.parametrize("tied", [True, False, None])
@pytest.mark.parametrize("head_dim", [16, None])
@pytest.mark.parametrize("kind", PLAIN)
def test_a_config_says_the_shape_of_every_parameter(kind: str, head_dim: int | None, tied: bool | None):
    given: dict[str, Any] = {"head_dim": head_dim, "tie_word_embeddings": tied}
    said = {**SIZES, **{name: value for name, value in given.items() if value is not None}}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **said))
    real = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert config_shapes({"model_type": kind, **said}) == real


@pytest.mark.parametrize("other", [{"model_type": "qwen3_moe"}, {"attention_bias": True}, {"hidden_size": None}])
def test_a_config_that_is_not_known_says_nothing(other: dict[str, Any]):
    assert config_shapes({"model_type": "llama", **SIZES, **other}) == {}

"""Tiny models of architectures whose layers carry a state along the tokens, and of some that are near them and carry none."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_DELTA_NET = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}

MIXING: dict[str, dict[str, Any]] = {
    "qwen3_next": {**_DELTA_NET, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": _DELTA_NET,
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"], "conv_L_cache": 3},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "jamba": {"use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
}
"""model_type → what its config needs beside the common shape."""
APART: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4},
    "qwen3_moe": {**_EXPERTS, "head_dim": 8},
    "gpt2": {},
}


def tiny(
    kind: str, tokens: int, *, seed: int = 0, initializer_range: float = 0.02, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A randomly initialised model of the `model_type`, in eval mode."""
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128} if kind == "gpt2" else _SHAPE
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    more = {**MIXING, **APART}[kind]
    config = AutoConfig.for_model(
        kind, **{**shape, "vocab_size": tokens, "initializer_range": initializer_range, **special, **more}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).to(dtype).eval()

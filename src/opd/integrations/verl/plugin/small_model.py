"""A model of the same class as another, small enough to run in a moment: same kinds of layer, random weights."""

from __future__ import annotations

from typing import Any

import torch

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "intermediate_size": 128,
    "n_inner": 128,
    "ffn_dim": 128,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "max_window_layers": 2,
}
"""No larger than this in a stand-in, by the names of transformers' config classes."""
PER_LAYER = ("layer_types", "mlp_layer_types")
LEFT_OUT = ("quantization_config", "auto_map", "dtype", "torch_dtype")
INITIALIZER_RANGE = 0.2  # distributions far from uniform, and from each other, so that a loss has something to show
MOST_PARAMETERS = 60_000_000  # a vocabulary of 262 144 tokens, twice 64 wide, is half of it
NOT_BUILT = Exception
"""Raised for a model that cannot be read, or made this small: anything, by classes and validators of other people."""


def small_model(config: Any, rows: int, seed: int) -> Any:
    """A model of this class that was seen to run, or why there is none."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(shrink(config, rows), dtype=torch.float32).eval()
            logits = model(input_ids=torch.arange(4)[None] % rows, use_cache=False).logits
    except NOT_BUILT as error:
        return in_short(error)
    if logits.shape[-1] != rows or not logits.isfinite().all():
        return "its logits are not finite"
    size = sum(parameter.numel() for parameter in model.parameters())
    return model if size <= MOST_PARAMETERS else f"{size / 1e6:.0f} M parameters"


def shrink(config: Any, rows: int) -> Any:
    """The same class and kinds of layer; few and narrow layers, and `rows` tokens."""
    old = {name: value for name, value in config.to_dict().items() if name not in LEFT_OUT}
    new = {**old, "vocab_size": rows}
    for name, most in SIZES.items():
        name = config.attribute_map.get(name, name)
        value = old.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            new[name] = min(value, most)
    heads, groups = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if "num_key_value_heads" in old and groups is not None:
        new["num_key_value_heads"] = 1 if groups == 1 else 4 if groups == heads else 2
    for name in PER_LAYER:
        if isinstance(old.get(name), list) and old[name]:
            layers = min(len(old[name]), SIZES["num_hidden_layers"])
            kinds = list(dict.fromkeys(old[name]))[:layers]
            new[name] = (kinds * layers)[:layers]
    if "initializer_range" in old:
        new["initializer_range"] = INITIALIZER_RANGE
    return type(config).from_dict(new)


def in_short(error: Exception) -> str:
    if isinstance(error, OSError):
        return "no config and tokenizer on this disk"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"

"""Shapes of every parameter of well-known decoders, from their config alone: for folders and hub names without weights on this disk.
Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

PLAIN = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
"""transformers' model types whose layers are known here; others are counted by building them on the meta device."""
NORMED_HEADS = ("qwen3", "gemma3_text")
FOUR_NORMS = ("gemma3_text",)
BIASED = ("qwen2",)

Shapes = dict[str, tuple[int, ...]]


def config_shapes(config: Mapping[str, Any]) -> Shapes:
    """Shapes by name, tied ones once; empty for a model of another type, or with a config that lacks a size. `config` is a config.json."""
    kind = config.get("model_type")
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    biased = config.get("attention_bias") or config.get("mlp_bias")  # of Llama's variants
    if kind not in PLAIN or biased or not all(isinstance(config.get(name), int) for name in names):
        return {}
    hidden, rows = int(config["hidden_size"]), int(config["vocab_size"])
    shapes: Shapes = {"model.embed_tokens.weight": (rows, hidden), "model.norm.weight": (hidden,)}
    for layer in range(int(config["num_hidden_layers"])):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in _layer(str(kind), config, hidden)}
    tied = config.get("tie_word_embeddings", kind in FOUR_NORMS)  # transformers' defaults
    return shapes if tied else {**shapes, "lm_head.weight": (rows, hidden)}


def _layer(kind: str, config: Mapping[str, Any], hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    heads, wide = int(config["num_attention_heads"]), int(config["intermediate_size"])
    size = int(config.get("head_dim") or (DEFAULT_HEAD_DIM.get(kind) or hidden // heads))
    outputs = {"q": heads * size, "k": int(config.get("num_key_value_heads") or heads) * size}
    outputs["v"] = outputs["k"]
    for name, width in outputs.items():
        yield f"self_attn.{name}_proj.weight", (width, hidden)
        if kind in BIASED:
            yield f"self_attn.{name}_proj.bias", (width,)
    yield "self_attn.o_proj.weight", (hidden, heads * size)
    if kind in NORMED_HEADS:
        yield "self_attn.q_norm.weight", (size,)
        yield "self_attn.k_norm.weight", (size,)
    yield "mlp.gate_proj.weight", (wide, hidden)
    yield "mlp.up_proj.weight", (wide, hidden)
    yield "mlp.down_proj.weight", (hidden, wide)
    extra = ("pre_feedforward_layernorm", "post_feedforward_layernorm") if kind in FOUR_NORMS else ()
    for name in ("input_layernorm", "post_attention_layernorm", *extra):
        yield f"{name}.weight", (hidden,)


DEFAULT_HEAD_DIM = {"qwen3": 128, "gemma3_text": 256}
"""transformers' own, for a config that says none."""

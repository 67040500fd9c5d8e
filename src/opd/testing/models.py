"""Real transformers models, small enough to train inside a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

Architecture = Literal["qwen3", "llama", "gpt2"]


def tiny_causal_lm(
    tokenizer: PreTrainedTokenizerBase | int,
    *,
    architecture: Architecture = "qwen3",
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    max_positions: int = 512,
    vocab_size: int | None = None,
    tie: bool = True,
    seed: int = 0,
    initializer_range: float = 0.02,
) -> PreTrainedModel:
    """A randomly initialised float32 model in eval mode. The global random state is preserved.

    `tokenizer` may be a bare vocabulary size; then no EOS or PAD id is set. `vocab_size` pads the embedding beyond the
    tokenizer, as released models do. A larger `initializer_range` makes the next-token distributions less uniform.
    """
    tokens = tokenizer if isinstance(tokenizer, int) else len(tokenizer)
    rows = tokens if vocab_size is None else vocab_size
    if rows < tokens:
        raise ValueError(f"vocab_size={rows} is smaller than the {tokens} tokens of the tokenizer")
    special = {"eos_token_id": None, "pad_token_id": None, "bos_token_id": None}
    if not isinstance(tokenizer, int):
        special = {name: getattr(tokenizer, name) for name in special}
    shared = {"vocab_size": rows, "tie_word_embeddings": tie, "initializer_range": initializer_range, **special}
    sizes = {"layers": layers, "hidden": hidden, "heads": heads, "kv_heads": kv_heads, "max_positions": max_positions}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(architecture, shared, **sizes)
    return model.float().eval()


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> str:
    """Write model and tokenizer where `from_pretrained` finds both; returns the folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _build(
    architecture: Architecture,
    shared: dict[str, Any],
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    max_positions: int,
) -> PreTrainedModel:
    if architecture == "gpt2":
        gpt2 = {"n_layer": layers, "n_embd": hidden, "n_head": heads, "n_positions": max_positions, "resid_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(**gpt2, embd_pdrop=0.0, attn_pdrop=0.0, **shared))
    modern = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": max_positions,
        **shared,
    }
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**modern))
    if architecture == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**modern))
    raise ValueError(f"architecture {architecture!r} is not one of qwen3, llama, gpt2")

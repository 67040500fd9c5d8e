"""The sizes of a model, from its config and the headers of its files. No weight is read. Without such headers, the config of a
well-known model says them; others are counted on the meta device, which takes torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd.doctor.config_shapes import config_shapes
from opd.errors import ModelError
from opd.reporting.model_facts import CONFIG, adapter_base, folder_of, read_json, weight_shapes

HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "wpe.weight", "word_embeddings.weight", "embed_in.weight", HEAD)
"""Ends of the names of embeddings and output layers in transformers' language models."""
SIZE_OF = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1}
"""Bytes of an entry by safetensors' name of its dtype."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder. Counts are of entries, not bytes."""

    weights: Mapping[str, tuple[int, ...]]
    """Shape of every parameter by name; tied ones are there once."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width of the feed-forward layers."""
    vocabulary: int
    """Rows of the output layer, padding included."""
    positions: int | None = None
    """Tokens of the context, where the config says so."""
    stored_bytes: int = 0
    """Of the weights in their files; 0 is unknown."""
    normed_heads: bool = False
    """Queries and keys are normalised, as in Qwen3."""
    gated: bool = True
    """The feed-forward layers have three matrices, as in Llama, and not two, as in GPT-2."""

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.weights.values())

    @property
    def hidden_matrices(self) -> Mapping[str, tuple[int, ...]]:
        """Matrices between embedding and output layer: what Muon and adapters of 'all-linear' take."""
        return {
            name: shape for name, shape in self.weights.items() if len(shape) == 2 and not name.endswith(EMBEDDINGS)
        }


def is_quick(name: str, revision: str | None = None) -> bool:
    """True where `model_shape` of the model needs no torch: its weights are on this disk, or its config says it all."""
    base = adapter_base(name)
    name, revision = (name, revision) if base is None else (base, None)
    folder = folder_of(name, revision)
    if folder is None:
        return False
    return bool(stored_shapes(name, revision) or config_shapes(read_json(folder / CONFIG)))


def stored_shapes(name: str, revision: str | None = None) -> Mapping[str, tuple[int, ...]]:
    """Shapes of the weights in the model's files; empty where there are none on this disk, or where they are packed."""
    folder = folder_of(name, revision)
    stored = weight_shapes(folder) if folder is not None else {}
    return {} if any(tensor.packed for tensor in stored.values()) else {n: t.shape for n, t in stored.items()}


def model_shape(name: str, role: str, *, revision: str | None = None, trust_remote_code: bool = False) -> ModelShape:
    """The sizes of a local folder or a hub name; of an adapter's folder, those of its base. Raises ModelError for a config that cannot
    be read, or has no such sizes."""
    from transformers import AutoConfig

    from opd.adapter import check_base
    from opd.load_errors import UNREADABLE, load_failure

    base = adapter_base(name)
    if base is not None:
        check_base(base, name, role)
        name, revision = base, None
    try:
        whole: Any = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except UNREADABLE as error:
        raise ModelError(load_failure(role, "config", name, error)) from error
    config = whole.get_text_config()
    tied = bool(getattr(config, "tie_word_embeddings", False))
    stored = {} if config is not whole else dict(stored_shapes(name, revision))
    if tied:
        stored = {name: shape for name, shape in stored.items() if name != HEAD}
    weights = stored or (config_shapes(config.to_dict()) if config is whole else {}) or _on_meta_device(whole)
    size = _stored_bytes(name, revision) if stored else 0
    try:
        return shape_of(config, weights, stored_bytes=size)
    except (AttributeError, TypeError) as error:
        raise ModelError(
            f"The config of the {role} '{name}' does not say how large its layers are ({error}), so nothing can be said about its memory. "
            "The run itself may still be right: try it with --train.steps 2."
        ) from error


def shape_of(config: Any, weights: Mapping[str, tuple[int, ...]], *, stored_bytes: int = 0) -> ModelShape:
    """The sizes that a config of transformers says. Raises AttributeError or TypeError where it lacks one."""
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return ModelShape(
        weights=weights,
        layers=int(config.num_hidden_layers),
        hidden=hidden,
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
        intermediate=int(inner or 4 * hidden),
        vocabulary=int(config.vocab_size),
        positions=getattr(config, "max_position_embeddings", None),
        stored_bytes=stored_bytes,
        normed_heads=any(name.endswith("q_norm.weight") for name in weights),
        gated=any("gate" in name for name in weights),
    )


def _stored_bytes(name: str, revision: str | None) -> int:
    folder = folder_of(name, revision)
    stored = weight_shapes(folder).values() if folder is not None else ()
    return sum(math.prod(tensor.shape) * SIZE_OF.get(tensor.dtype, 4) for tensor in stored)


def _on_meta_device(config: Any) -> Mapping[str, tuple[int, ...]]:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

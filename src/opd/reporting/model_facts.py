"""Size, type and vocabulary of a model, from the small files beside its weights. Nothing is loaded, and nothing is downloaded."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 50_000_000  # bytes; a longer one is no header


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Facts of a model on this disk. 0 and "" are unknown."""

    here: bool = False
    """Its files are on this disk, so that nothing has to be downloaded."""
    parameters: int = 0
    dtype: str = ""
    vocabulary: int = 0
    adapter_of: str = ""
    """The base of an adapter, whose facts the others are."""

    def __str__(self) -> str:
        parts = [f"adapter of {self.adapter_of}" if self.adapter_of else ""]
        parts += [f"{count(self.parameters)} parameters" if self.parameters else "", self.dtype]
        parts.append(f"vocabulary {self.vocabulary:,}" if self.vocabulary else "")
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Shape and dtype of a weight in a safetensors file; dtypes are the format's names, such as BF16."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def packed(self) -> bool:
        """It holds weights of a quantised model; how many is not said."""
        return self.dtype in ("U8", "I32")


def model_facts(name: str, revision: str | None = None) -> ModelFacts:
    """Facts of a local folder, or of a hub name that was downloaded before. Files that are missing or broken leave them unknown."""
    folder = folder_of(name, revision)
    if folder is None:
        return ModelFacts()
    base = adapter_base(name)
    if base is not None:
        return replace(model_facts(base) if base != name else ModelFacts(), here=True, adapter_of=base)
    config = read_json(folder / CONFIG)
    config = {**config, **(config.get("text_config") or {})}  # of a multimodal model
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    vocabulary = config.get("vocab_size")
    return ModelFacts(
        here=True,
        parameters=_counted(folder) or _estimated(config),
        dtype=dtype,
        vocabulary=vocabulary if isinstance(vocabulary, int) else 0,
    )


def count(number: float) -> str:
    """494M, 7.6B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            value = number / size
            return f"{value:.0f}{unit}" if value >= 99.5 else f"{value:.1f}{unit}"
    return f"{number:.0f}"


def folder_of(name: str, revision: str | None) -> Path | None:
    """The local folder of this name, or that of a hub name which was downloaded before; None elsewhere."""
    if name and Path(name).is_dir():
        return Path(name)
    if not name or name.startswith((".", "/", "~")) or name.count("/") > 1:
        return None
    from huggingface_hub import try_to_load_from_cache  # needs 0.2 s

    try:
        found = try_to_load_from_cache(name, CONFIG, revision=revision)
    except ValueError:  # no name that the hub could have
        return None
    return Path(found).parent if isinstance(found, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """The object in this file; empty where it is missing or broken."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def weight_shapes(folder: Path) -> dict[str, StoredTensor]:
    """Every weight by name, from the headers of the safetensors files; empty where one is missing or broken."""
    shards = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values())) or [WEIGHTS]
    found: dict[str, StoredTensor] = {}
    try:
        for shard in shards:
            found |= _in_file(folder / str(shard))
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError):
        return {}
    return found


def adapter_base(name: str) -> str | None:
    """The base that a local adapter folder names; None for a whole model, and for a hub name."""
    folder = Path(name)
    base = (
        None
        if not name or (folder / CONFIG).exists()
        else read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    )
    return base if isinstance(base, str) and base else None


def adapter_parameters(folder: Path) -> int:
    """Parameters of an adapter's own file; 0 where it cannot be read."""
    try:
        return sum(math.prod(tensor.shape) for tensor in _in_file(folder / ADAPTER_WEIGHTS).values())
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError):
        return 0


def _counted(folder: Path) -> int:
    """Parameters of the safetensors files; 0 where one is missing, or quantised."""
    tensors = weight_shapes(folder).values()
    return 0 if any(tensor.packed for tensor in tensors) else sum(math.prod(tensor.shape) for tensor in tensors)


def _in_file(path: Path) -> dict[str, StoredTensor]:
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > MAX_HEADER:
            raise ValueError(length)
        header: Mapping[str, Any] = json.loads(stream.read(length))
    return {
        name: StoredTensor(shape=tuple(map(int, value["shape"])), dtype=str(value["dtype"]))
        for name, value in header.items()
        if name != "__metadata__"
    }


def _estimated(config: Mapping[str, Any]) -> int:
    """Parameters of a decoder with gated feed-forward layers; 0 where the config has other names."""
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "num_attention_heads")
    hidden, layers, wide, vocabulary, heads = (config.get(name) for name in names)
    if not all(isinstance(value, int) and value > 0 for value in (hidden, layers, wide, vocabulary, heads)):
        return 0
    assert hidden and layers and wide and vocabulary and heads
    size = config.get("head_dim") or hidden // heads
    pairs = config.get("num_key_value_heads") or heads
    if any(config.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return 0
    attention = 2 * hidden * size * heads + 2 * hidden * size * pairs
    embeddings = vocabulary * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return layers * (attention + 3 * hidden * wide + 2 * hidden) + embeddings + hidden

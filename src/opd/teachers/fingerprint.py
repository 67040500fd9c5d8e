"""A hash of everything in a model that its outputs for given token ids depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import PreTrainedModel

NOT_IN_OUTPUTS = ("_name_or_path", "transformers_version", "use_cache", "_attn_implementation", "attn_implementation")
"""Keys of a config that say where a model came from, or how fast it is."""


@torch.no_grad()
def model_fingerprint(model: PreTrainedModel, *, adapter_off: bool = False) -> str:
    """Of every entry of its weights and buffers, with names, shapes and dtypes, and of its config. With `adapter_off`, weights that
    are trained, which are the adapter's, do not count."""
    trained = {name for name, parameter in model.named_parameters() if adapter_off and parameter.requires_grad}
    tensors: dict[str, Any] = {**dict(model.named_buffers()), **model.state_dict()}
    names = sorted(name for name, value in tensors.items() if isinstance(value, torch.Tensor) and name not in trained)
    config = {key: value for key, value in model.config.to_dict().items() if key not in NOT_IN_OUTPUTS}
    digest = hashlib.sha256(type(model).__name__.encode())
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        for name, part in zip(names, pool.map(lambda name: _digest_of(tensors[name]), names), strict=True):
            digest.update(name.encode() + part)
    return digest.hexdigest()


def _digest_of(tensor: torch.Tensor) -> bytes:
    digest = hashlib.sha256()
    for part in _plain_parts(tensor.detach()):
        digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
        content: Any = part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(content)
    return digest.digest()


def _plain_parts(tensor: Any) -> Iterator[torch.Tensor]:
    """The tensor itself, or the ones that a quantised tensor is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain_parts(getattr(tensor, name))

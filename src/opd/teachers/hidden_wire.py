"""The format in which hidden states travel between `opd serve-teacher` and its client: safetensors, with a receipt for every row.

A receipt repeats the caller's id and holds a hash of the token ids that were read, so a client can tell that an answer is about
its row, whatever order or copy it came in.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

FORMAT = "1"
"""Both sides speak this one."""
CONTENT_TYPE = "application/x-safetensors"
LENGTH_BYTES = 8  # of a safetensors file: the length of its header, little-endian
PIECE_BYTES = 4 << 20
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
"""Dtypes in a safetensors header."""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """One row of an answer: the caller's id, a hash of what was read, and its number of positions."""

    id: str
    digest: str
    tokens: int


def digest_of(prompt: Sequence[int], response: Sequence[int], positions: Sequence[int] | None = None) -> str:
    """A hash of a row's token ids, of where its response begins, and of the positions that are wanted (None: all)."""
    wanted = range(len(response)) if positions is None else positions
    digest = hashlib.blake2b(digest_size=16)
    for part in (prompt, response, wanted):
        digest.update(array("q", [len(part), *part]).tobytes())
    return digest.hexdigest()


def write_answer(tensors: Mapping[str, Tensor], receipts: Sequence[Receipt], identity: str) -> bytes:
    """The tensors of an answer, whose rows are those of the receipts one after the other, from the model of this identity."""
    rows = json.dumps([[receipt.id, receipt.digest, receipt.tokens] for receipt in receipts])
    metadata = {"format": FORMAT, "identity": identity, "rows": rows}
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)


def read_answer(content: bytes) -> tuple[dict[str, Tensor], list[Receipt], str]:
    """The tensors, the receipts and the identity of an answer. Raises ValueError for bytes that are none."""
    try:
        tensors, metadata = load(content), read_metadata(content)
        rows = [Receipt(id=i, digest=d, tokens=n) for i, d, n in json.loads(metadata["rows"])]
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"not an answer of opd serve-teacher: {error}") from error
    return tensors, rows, metadata["identity"]


def read_metadata(content: bytes) -> dict[str, str]:
    """The text beside the tensors of a safetensors file."""
    length = int.from_bytes(content[:LENGTH_BYTES], "little")
    return json.loads(content[LENGTH_BYTES : LENGTH_BYTES + length]).get("__metadata__") or {}


def stream(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[int, Iterator[bytes]]:
    """The length of a safetensors file, and its bytes a few MiB at a time: a large tensor is never copied whole."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)

    def pieces() -> Iterator[bytes]:
        yield len(text).to_bytes(LENGTH_BYTES, "little") + text
        for tensor in tensors.values():
            yield from raw_pieces(tensor)

    return LENGTH_BYTES + len(text) + end, pieces()


def raw_pieces(tensor: Tensor) -> Iterator[bytes]:
    """The bytes of a tensor's entries, a few MiB at a time."""
    flat = tensor.detach().reshape(-1)
    step = max(1, PIECE_BYTES // tensor.element_size())
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step].cpu().view(torch.uint8).numpy().tobytes()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of all bytes, names, shapes and dtypes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {NAMES[tensor.dtype]} {list(tensor.shape)}".encode())
        for piece in raw_pieces(tensor):
            digest.update(piece)
    return digest.hexdigest()

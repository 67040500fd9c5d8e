"""Tensors by the hash of what they are about, in a folder that a kill at any moment cannot spoil, and that processes may share.

A shard is a safetensors file. It is written under a hidden name, synced, renamed into place, and never changed: it is there whole, or
not at all. Its name is the checksum of its header, and the header holds the checksum of every entry; both are compared at every read,
so that a flipped bit is an error and never a wrong tensor. index.json only saves reading all headers at the start.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file

from opd.durable import sync_folder
from opd.errors import CacheError

FORMAT = "1"
SUFFIX = ".safetensors"
WRITING = ".writing-"
INDEX = "index.json"
SHARD_BYTES = 1 << 28  # of tensors: what a write holds in memory beside them
HEADER_ENTRIES = 20_000  # kept in memory, of the headers read last
INDEX_EVERY = 64  # new shards
SPARE_BYTES = 1 << 30  # left free on the disk: a run's checkpoints come first
LOCK_SECONDS = 60.0  # a shard takes seconds
CANNOT_WRITE = (
    OSError,
    SafetensorError,
    NotImplementedError,
)  # the last is filelock's, where a file system has no locks
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Entry = Mapping[str, torch.Tensor]


class TensorStore:
    """Entries by a key of 64 hexadecimal digits. What is in it never changes; a key that is there already is not written again."""

    def __init__(self, folder: str | Path) -> None:
        """Makes the folder where it is missing. Raises CacheError for a damaged shard, and for a folder that cannot be read or made."""
        self.folder = Path(folder)
        self.unwritten = ""
        """The reason why nothing is written any more; '' while writing goes well."""
        self._shard_of: dict[bytes, str] = {}
        self._sizes: dict[str, int] = {}
        self._headers: OrderedDict[str, _Header] = OrderedDict()
        self._listed_at = -1
        self._unindexed = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._read_index()
            self._list()
        except OSError as error:
            raise CacheError(
                f"The kept scores in '{self.folder}' cannot be read: {error.strerror or error}. Name a folder that you may read and write."
            ) from error
        self._clean()

    def __len__(self) -> int:
        return len(self._shard_of)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(self._sizes.values())

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._shard_of

    def refresh(self) -> None:
        """Take in the shards that other processes have written. Raises CacheError for a damaged one."""
        with suppress(OSError):  # a folder that is gone has nothing new
            self._list()

    def _list(self) -> None:
        changed_at = self.folder.stat().st_mtime_ns
        if changed_at == self._listed_at:
            return
        there = {name for name in os.listdir(self.folder) if _is_shard(name)}
        for name in self._sizes.keys() - there:
            self._forget(name)
        for name in there - self._sizes.keys():
            with suppress(FileNotFoundError):  # deleted meanwhile
                header = self._header(name)
                self._add(name, (self.folder / name).stat().st_size, header.entries)
        self._listed_at = changed_at

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        """The tensors of an entry; None where there is none. Raises CacheError for a damaged one."""
        name = self._shard_of.get(bytes.fromhex(key))
        if name is None:
            return None
        path = self.folder / name
        try:
            header = self._header(name)
            if key not in header.entries:  # the index was wrong: the headers say what is where
                self._shard_of, self._sizes, self._listed_at = {}, {}, -1
                self._list()
                return self.get(key)
            with open(path, "rb") as file:
                return header.read(key, file)
        except FileNotFoundError:  # deleted by somebody
            self._forget(name)
            return None
        except OSError as error:
            raise _damaged(path, f"entry {key} cannot be read: {error.strerror or error}") from error

    def put(self, entries: Mapping[str, Entry], about: Mapping[str, str]) -> None:
        """Write new entries; `about` says in the shard what they are, for people. On a full disk or a read-only folder nothing is
        written from then on, and `unwritten` says why: a run goes on without."""
        if self.unwritten or all(key in self for key in entries):
            return
        try:
            with FileLock(self.folder / ".lock", timeout=LOCK_SECONDS):
                self.refresh()
                self._remove_leftovers()
                for part in _parts({key: entry for key, entry in entries.items() if key not in self}):
                    self._write(part, about)
                if self._unindexed >= INDEX_EVERY:
                    self._write_index()
        except CANNOT_WRITE as error:
            self.unwritten = str(getattr(error, "strerror", None) or error)

    def close(self) -> None:
        """Write the index. The store can be used further."""
        if not self._unindexed or self.unwritten:
            return
        with suppress(*CANNOT_WRITE), FileLock(self.folder / ".lock", timeout=LOCK_SECONDS):
            self.refresh()
            self._write_index()

    def _write(self, entries: Mapping[str, Entry], about: Mapping[str, str]) -> None:
        tensors = {f"{key}/{name}": _plain(t) for key, entry in entries.items() for name, t in entry.items()}
        wanted = sum(t.nbytes for t in tensors.values())
        free = shutil.disk_usage(self.folder).free
        if free < wanted + SPARE_BYTES:
            raise OSError(f"{free / 2**30:.1f} GiB are left on the disk, and checkpoints come first")
        sums = {key: _checksum(key, ((n, tensors[f"{key}/{n}"]) for n in entry)) for key, entry in entries.items()}
        temporary = self.folder / f"{WRITING}{os.getpid()}-{uuid.uuid4().hex}"
        try:
            save_file(tensors, temporary, {"format": FORMAT, **about, **sums})
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
                name = _name_of(_header_bytes(file)) + SUFFIX
            os.replace(temporary, self.folder / name)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        sync_folder(self.folder)
        self._add(name, (self.folder / name).stat().st_size, entries)

    def _header(self, name: str) -> _Header:
        """The header of a shard, compared with its checksum when it is read."""
        if name in self._headers:
            self._headers.move_to_end(name)
            return self._headers[name]
        header = self._headers[name] = _Header.of(self.folder / name)
        while len(self._headers) > 1 and sum(len(h.entries) for h in self._headers.values()) > HEADER_ENTRIES:
            self._headers.popitem(last=False)
        return header

    def _add(self, name: str, size: int, keys: Iterable[str]) -> None:
        self._unindexed += name not in self._sizes
        self._sizes[name] = size
        for key in keys:
            self._shard_of.setdefault(bytes.fromhex(key), name)

    def _forget(self, name: str) -> None:
        self._sizes.pop(name, None)
        self._headers.pop(name, None)
        self._shard_of = {key: shard for key, shard in self._shard_of.items() if shard != name}
        self._listed_at = -1  # another shard may have the same entries

    def _read_index(self) -> None:
        """An index that is missing, cut short or of other shards costs time alone: headers are read in its place, and decide."""
        try:
            index = json.loads((self.folder / INDEX).read_bytes())
            shards = index["shards"] if index["format"] == FORMAT else {}
            for name, shard in shards.items():
                if _is_shard(name) and (self.folder / name).stat().st_size == shard["size"]:
                    self._add(name, shard["size"], [key for key in shard["keys"] if len(bytes.fromhex(key)) == 32])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self._shard_of, self._sizes = {}, {}
        self._unindexed = 0

    def _write_index(self) -> None:
        keys: dict[str, list[str]] = {name: [] for name in self._sizes}
        for key, name in self._shard_of.items():
            keys[name].append(key.hex())
        shards = {name: {"size": size, "keys": keys[name]} for name, size in self._sizes.items()}
        temporary = self.folder / f"{WRITING}{os.getpid()}-{uuid.uuid4().hex}"
        try:
            with open(temporary, "w", encoding="ascii") as file:
                json.dump({"format": FORMAT, "shards": shards}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / INDEX)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        self._unindexed = 0

    def _clean(self) -> None:
        """Delete what killed writers left, unless another process is writing now."""
        with suppress(*CANNOT_WRITE):
            if any(self.folder.glob(f"{WRITING}*")):
                with FileLock(self.folder / ".lock", timeout=0):
                    self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Under the lock nobody else is writing, so a file that is being written is a leftover of one that was killed."""
        for leftover in self.folder.glob(f"{WRITING}*"):
            leftover.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Header:
    """Where the entries of a shard lie in it, and their checksums."""

    path: Path
    entries: Mapping[str, tuple[_Field, ...]]
    sums: Mapping[str, str]

    @classmethod
    def of(cls, path: Path) -> _Header:
        """Raises CacheError where the header is not the one that was written, or the file has another length."""
        with open(path, "rb") as file:
            raw = _header_bytes(file)
            size = os.fstat(file.fileno()).st_size
        if _name_of(raw) != path.name.removesuffix(SUFFIX):
            raise _damaged(path, "its header is not what was written")
        header: dict[str, Any] = json.loads(raw[8:])
        sums: dict[str, str] = header.pop("__metadata__")
        entries: dict[str, tuple[_Field, ...]] = {}
        for full, info in header.items():
            key, _, name = full.partition("/")
            start, end = (len(raw) + offset for offset in info["data_offsets"])
            field = _Field(name=name, dtype=info["dtype"], shape=tuple(info["shape"]), start=start, end=end)
            entries[key] = (*entries.get(key, ()), field)
        whole = max((field.end for fields in entries.values() for field in fields), default=len(raw))
        if size != whole:
            raise _damaged(path, f"it has {size} bytes, and was written with {whole}")
        return cls(path=path, entries=entries, sums=sums)

    def read(self, key: str, file: Any) -> dict[str, torch.Tensor]:
        """The tensors of an entry. Raises CacheError where they are not those that were written."""
        tensors: dict[str, torch.Tensor] = {}
        for field in self.entries[key]:
            content = bytearray(field.end - field.start)
            file.seek(field.start)
            if file.readinto(content) != len(content):
                raise _damaged(self.path, f"entry {key} is cut short")
            flat = torch.frombuffer(content, dtype=DTYPES[field.dtype]) if content else torch.empty(0)
            tensors[field.name] = flat.to(DTYPES[field.dtype]).reshape(field.shape)
        if _checksum(key, tensors.items()) != self.sums.get(key):
            raise _damaged(self.path, f"entry {key} is not what was written")
        return tensors


def _header_bytes(file: Any) -> bytes:
    """The first bytes of a safetensors file: the header's length in 8 of them, and the header; fewer where the file is shorter."""
    prefix = file.read(8)
    return prefix + file.read(min(int.from_bytes(prefix, "little"), os.fstat(file.fileno()).st_size))


def _name_of(header: bytes) -> str:
    return hashlib.sha256(header).hexdigest()[:32]


def _checksum(key: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256(key.encode())
    for name, tensor in sorted(tensors):
        digest.update(f"/{name} {tensor.dtype} {tuple(tensor.shape)}/".encode())
        content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()[:32]


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, in memory of its own."""
    assert tensor.dtype in NAMES, tensor.dtype
    return tensor.detach().to("cpu", copy=True).contiguous()


def _parts(entries: Mapping[str, Entry]) -> Iterable[dict[str, Entry]]:
    """The entries in shards of at most SHARD_BYTES each, or of one entry."""
    part: dict[str, Entry] = {}
    size = 0
    for key, entry in entries.items():
        own = sum(tensor.nbytes for tensor in entry.values())
        if part and size + own > SHARD_BYTES:
            yield part
            part, size = {}, 0
        part[key] = entry
        size += own
    if part:
        yield part


def _is_shard(name: str) -> bool:
    return name.endswith(SUFFIX) and not name.startswith(".")


def _damaged(path: Path, what: str) -> CacheError:
    return CacheError(
        f"Kept scores are damaged: '{path}': {what}. Delete that file, and go on: the teacher scores again what it held. Look at the disk "
        "if it happens again."
    )


def content_key(about: Mapping[str, Any], *ids: Iterable[int]) -> str:
    """The key of what is said `about` some sequences of token ids; any other description or ids have another key."""
    digest = hashlib.sha256()
    for part in (json.dumps(about, sort_keys=True).encode(), *(_ids_bytes(sequence) for sequence in ids)):
        digest.update(struct.pack("<q", len(part)))
        digest.update(part)
    return digest.hexdigest()


def _ids_bytes(ids: Iterable[int]) -> bytes:
    sequence = tuple(ids)
    return struct.pack(f"<{len(sequence)}q", *sequence)

"""A store of tensors: nothing that was complete is lost, nothing else is read, and no bit may flip unseen."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from opd.errors import CacheError
from opd.teachers import store as store_file
from opd.teachers.store import TensorStore, content_key

ABOUT = {"teacher": "a test"}


def key_of(number: int) -> str:
    return content_key({"teacher": "a"}, [number])


def entry_of(number: int) -> dict[str, torch.Tensor]:
    """Other tensors, of other shapes, for every number."""
    generator = torch.Generator().manual_seed(number)
    return {
        "hidden": torch.randn(1 + number % 5, 3, generator=generator).bfloat16(),
        "ids": torch.randint(1000, (1 + number % 3,), generator=generator, dtype=torch.int32),
    }


def filled(folder: Path, *numbers: int) -> TensorStore:
    store = TensorStore(folder)
    store.put({key_of(n): entry_of(n) for n in numbers}, ABOUT)
    assert not store.unwritten
    return store


def is_right(store: TensorStore, number: int) -> bool:
    found = store.get(key_of(number))
    assert found is not None, number
    wanted = entry_of(number)
    same = found.keys() == wanted.keys() and all(
        torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in wanted
    )
    assert same, f"entry {number} is another one"
    return same


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_what_is_put_is_got_bit_for_bit_by_this_store_and_by_others(tmp_path: Path):
    store = filled(tmp_path, 1, 2, 3)
    store.put({key_of(4): {"logp": torch.tensor([-torch.inf, -0.0, 1e-40]), "none": torch.empty(0, 4)}}, ABOUT)
    for reader in (store, TensorStore(tmp_path)):
        assert len(reader) == 4 and all(is_right(reader, n) for n in (1, 2, 3))
        last = reader.get(key_of(4))
        assert last is not None and last["none"].shape == (0, 4)
        assert last["logp"].tolist() == [float("-inf"), -0.0, torch.tensor(1e-40).item()]
        assert str(last["logp"][1].item()) == "-0.0"
        assert reader.get(key_of(5)) is None


def test_views_and_transposed_tensors_are_kept_as_they_look(tmp_path: Path):
    whole = torch.arange(24.0).reshape(4, 6)
    TensorStore(tmp_path).put({key_of(1): {"part": whole[1:3], "across": whole.T}}, ABOUT)
    found = TensorStore(tmp_path).get(key_of(1))
    assert found is not None and torch.equal(found["part"], whole[1:3]) and torch.equal(found["across"], whole.T)


def test_a_key_tells_apart_whatever_differs():
    one = content_key({"teacher": "a"}, [1, 2], [3])
    others = [
        content_key({"teacher": "b"}, [1, 2], [3]),
        content_key({"teacher": "a"}, [1], [2, 3]),
        content_key({"teacher": "a"}, [1, 2, 3], []),
        content_key({"teacher": "a"}, [2, 1], [3]),
        content_key({"teacher": "a", "k": 0}, [1, 2], [3]),
    ]
    assert len({one, *others}) == 6 and one == content_key({"teacher": "a"}, (1, 2), (3,))


def test_an_entry_is_written_once(tmp_path: Path):
    store = filled(tmp_path, 1, 2)
    store.put({key_of(1): entry_of(7), key_of(2): entry_of(7)}, ABOUT)
    assert len(shards(tmp_path)) == 1 and is_right(store, 1)
    TensorStore(tmp_path).put({key_of(2): entry_of(7), key_of(3): entry_of(3)}, ABOUT)
    assert len(shards(tmp_path)) == 2 and is_right(store, 2)
    store.refresh()
    assert is_right(store, 3)


def test_a_large_write_is_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store_file, "SHARD_BYTES", 64)
    store = filled(tmp_path, *range(20))
    assert 5 < len(shards(tmp_path)) < 20 and all(is_right(store, n) for n in range(20))


def test_headers_kept_in_memory_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store_file, "HEADER_ENTRIES", 4)
    for n in range(0, 30, 3):
        filled(tmp_path, n, n + 1, n + 2)
    store = TensorStore(tmp_path)
    assert all(is_right(store, n) for n in random.Random(0).sample(range(30), 30))
    assert len(store._headers) == 1


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indexed", [True, False])
def test_every_flipped_bit_of_a_shard_is_found_and_never_read(tmp_path: Path, indexed: bool):
    filled(tmp_path, 1, 2).close()
    index = (tmp_path / "index.json").read_bytes()
    (shard,) = shards(tmp_path)
    good = shard.read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        shard.write_bytes(bad)
        (tmp_path / "index.json").write_bytes(index if indexed else b"")
        errors = []
        for number in (1, 2):
            try:
                assert is_right(TensorStore(tmp_path), number)
            except CacheError as error:
                errors.append(str(error))
        assert errors, f"byte {place} of {len(good)}"
        assert all(str(shard) in e and "Delete that file" in e for e in errors)
    shard.write_bytes(good)
    assert is_right(TensorStore(tmp_path), 1) and is_right(TensorStore(tmp_path), 2)


def test_a_damaged_entry_is_named_and_the_one_beside_it_still_read(tmp_path: Path):
    filled(tmp_path, 1, 2)
    (shard,) = shards(tmp_path)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    store, right, errors = TensorStore(tmp_path), 0, []
    for number in (1, 2):
        try:
            right += is_right(store, number)
        except CacheError as error:
            errors.append(key_of(number) in str(error) and str(shard) in str(error))
    assert right == 1 and errors == [True]


@pytest.mark.parametrize("size", [0, 5, 8, 100, -1])
def test_a_shard_that_was_cut_short_or_grew_is_found(tmp_path: Path, size: int):
    filled(tmp_path, 1)
    (shard,) = shards(tmp_path)
    content = shard.read_bytes()
    shard.write_bytes(content[:size] if size >= 0 else content + b"x")
    with pytest.raises(CacheError, match="Delete that file"):
        TensorStore(tmp_path).get(key_of(1))


def test_the_advice_for_a_damaged_shard_works(tmp_path: Path):
    filled(tmp_path, 1)
    (shard,) = shards(tmp_path)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CacheError):
        TensorStore(tmp_path)
    shard.unlink()
    store = TensorStore(tmp_path)
    assert store.get(key_of(1)) is None
    store.put({key_of(1): entry_of(1)}, ABOUT)
    assert is_right(TensorStore(tmp_path), 1)


def test_an_entry_under_another_shards_name_is_found(tmp_path: Path):
    filled(tmp_path, 1)
    filled(tmp_path, 2)
    one, two = shards(tmp_path)
    one.write_bytes(two.read_bytes())
    with pytest.raises(CacheError, match="its header is not what was written"):
        TensorStore(tmp_path)


@pytest.mark.parametrize("index", ["", "{", "[]", '{"format": "1"}', '{"format": "0", "shards": {}}', "wrong keys"])
def test_a_bad_index_costs_nothing(tmp_path: Path, index: str):
    for n in (1, 2):
        filled(tmp_path, n)
    if index == "wrong keys":  # each shard's keys under the other's name
        sizes = {path.name: path.stat().st_size for path in shards(tmp_path)}
        one, two = sizes
        keys = {
            n: [k for k in (key_of(1), key_of(2)) if k not in TensorStore(tmp_path)._header(n).entries] for n in sizes
        }
        index = json.dumps({"format": "1", "shards": {n: {"size": sizes[n], "keys": keys[n]} for n in (one, two)}})
    (tmp_path / "index.json").write_text(index)
    store = TensorStore(tmp_path)
    assert is_right(store, 1) and is_right(store, 2)


def test_shards_that_somebody_deletes_are_forgotten(tmp_path: Path):
    store = filled(tmp_path, 1)
    other = TensorStore(tmp_path)
    shards(tmp_path)[0].unlink()
    assert store.get(key_of(1)) is None and len(store) == 0
    other.refresh()
    assert key_of(1) not in other
    other.put({key_of(1): entry_of(1)}, ABOUT)
    assert is_right(other, 1)


# --- disks that take no more ------------------------------------------------------------------------------------------


@contextmanager
def room_for_files_of(size: int) -> Iterator[None]:
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)


def test_a_full_disk_ends_the_writing_and_not_the_run(tmp_path: Path):
    store = filled(tmp_path, 1)
    with room_for_files_of(100):
        store.put({key_of(2): entry_of(2)}, ABOUT)
    assert store.unwritten
    store.put({key_of(3): entry_of(3)}, ABOUT)
    assert is_right(store, 1) and store.get(key_of(2)) is None and store.get(key_of(3)) is None
    assert not list(tmp_path.glob(".writing*")) and len(shards(tmp_path)) == 1
    assert is_right(filled(tmp_path, 2), 2)


def test_room_for_checkpoints_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store_file, "SPARE_BYTES", 1 << 60)
    store = TensorStore(tmp_path)
    store.put({key_of(1): entry_of(1)}, ABOUT)
    assert "checkpoints come first" in store.unwritten and not shards(tmp_path)


def test_a_folder_that_cannot_be_written_is_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    filled(tmp_path, 1).close()

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(store_file, "FileLock", refused)
    store = TensorStore(tmp_path)
    store.put({key_of(2): entry_of(2)}, ABOUT)
    store.close()
    assert store.unwritten == "Read-only file system" and is_right(store, 1)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="Name a folder"):
        TensorStore(tmp_path / "file" / "cache")


def test_a_writer_that_holds_the_lock_too_long_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = filled(tmp_path, 1)
    monkeypatch.setattr(store_file, "LOCK_SECONDS", 0.05)
    with store_file.FileLock(tmp_path / ".lock", is_singleton=False):
        store.put({key_of(2): entry_of(2)}, ABOUT)
    assert "lock" in store.unwritten


# --- kills ------------------------------------------------------------------------------------------------------------


def write_forever(folder: Path, first: int, report: int, pause: float) -> None:
    """In a child: entries one after the other, each told to the parent once it is there."""
    store = TensorStore(folder)
    number = first
    while True:
        several = [number + i for i in range(1 + number % 3)]
        store.put({key_of(n): entry_of(n) for n in several}, ABOUT)
        os.write(report, b"".join(n.to_bytes(8, "little") for n in several))
        if number % 4 == 0:
            store.close()
        number += len(several)
        time.sleep(pause)


def start_writer(folder: Path, first: int, pause: float = 0.0) -> tuple[int, int]:
    """The child's process id, and the pipe in which it tells what it has written."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            write_forever(folder, first, write, pause)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(1)
    os.close(write)
    return child, read


def kill(child: int, read: int) -> list[int]:
    """What a writer has told when it is killed."""
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the writer ended by itself"
    told = b""
    while piece := os.read(read, 1 << 16):
        told += piece
    os.close(read)
    return [int.from_bytes(told[i : i + 8], "little") for i in range(0, len(told), 8)]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [50, pytest.param(1000, marks=pytest.mark.endurance)])
def test_no_kill_loses_an_entry_or_leaves_a_wrong_one_beside_a_second_writer(tmp_path: Path, kills: int):
    moments = random.Random(0)
    per_folder, all_told, caught = 25 if kills < 100 else 50, 0, 0
    for group in range(kills // per_folder):
        folder = tmp_path / str(group)
        told: list[int] = []
        second = start_writer(folder, 10_000_000, pause=0.01)
        for number in range(per_folder):
            writer = start_writer(folder, 100_000 * number)
            time.sleep(moments.uniform(0.0, 0.025))
            told += kill(*writer)
            caught += any(folder.glob(".writing-*"))
        told += kill(*second)
        everything = {key_of(n) for n in told}
        for index in ("kept", "gone"):
            if index == "gone":
                (folder / "index.json").unlink(missing_ok=True)
            store = TensorStore(folder)
            assert all(is_right(store, n) for n in told)
            # One that was complete and not yet told is there too, and right: get() compares its checksum.
            assert all(store.get(key.hex()) is not None for key in store._shard_of)
            assert len(store) >= len(everything)
        store.put({key_of(-1 % 2**31): entry_of(1)}, ABOUT)
        assert not list(folder.glob(".writing-*")), "what a killed writer left is deleted"
        all_told += len(told)
    assert all_told > 2 * kills, "writers were killed while they wrote"
    assert caught > kills // 100, "some were killed in the middle of a file"

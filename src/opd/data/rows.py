"""Rows of a prompt file (JSON, parquet or a Hugging Face data set), each with its place in words for error messages."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from opd.data.reasoning_gym import PREFIX, task_rows
from opd.data.values import is_list, is_mapping, is_sequence, type_name
from opd.errors import DataError, MissingDependencyError

HUB_PREFIX = "hub:"
JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
BATCH_ROWS = 1024
"""Rows of a parquet file decoded at once."""
FEWER_ROWS = 16
"""Factor by which a batch shrinks when Arrow cannot hold it."""

_NOT_SPACE = re.compile(r"\S")

Row = tuple[str, Mapping[str, Any]]
"""The place of a row in words, and its columns."""


def read_rows(path: str, split: str, task: Mapping[str, Any] | None = None) -> Iterator[Row]:
    """The rows of `path`, in file order; `task` are the settings of `reasoning_gym:NAME` (see `task_rows`).

    Raises DataError for an unreadable file, and for a line that is no object.
    """
    if path.startswith(PREFIX):
        made = task_rows(path, **(task or {}))
        return ((f"row {index} of {path}", row) for index, row in enumerate(made))
    if path.startswith(HUB_PREFIX):
        return _hub_rows(path, split)
    file = Path(path).expanduser()
    if not file.exists():
        raise DataError(_missing_message(path, file))
    if file.is_dir():
        return _folder_rows(file, split)
    if file.name.endswith(JSON_SUFFIXES):
        return _json_rows(file)
    if file.suffix == ".parquet":
        return _parquet_rows(file)
    raise DataError(
        f"{path} ends in {file.suffix or 'no suffix'!r}, which is not a prompt format; use .jsonl (one JSON object "
        "per line), .json (an array of objects), either with .gz, .parquet, a folder written by datasets' save_to_disk, or "
        "hub:owner/name, or reasoning_gym:NAME."
    )


def given_rows(rows: Iterable[Any], name: str, prompt_column: str) -> Iterator[Row]:
    """Rows that are in memory: objects, or texts, each of which is a prompt. Raises DataError for anything else."""
    for index, row in enumerate(rows):
        place = f"row {index} of {name}"
        if not isinstance(row, (str, Mapping)):
            raise DataError(
                f"{place} is {type_name(row)}; a row is text, or a dict of columns such as {{'prompt': …}}."
            )
        yield place, {prompt_column: row} if isinstance(row, str) else row


def lookup(row: Mapping[str, Any], name: str) -> tuple[bool, Any]:
    """(True, value) for a column, else (False, None); without such a column, `a.b.0` reaches into objects and lists."""
    if name in row:
        return True, row[name]
    value: Any = row
    for part in name.split("."):
        if is_list(value) and value and all(isinstance(item, tuple) for item in value):
            value = dict(value)  # Arrow's maps
        if is_mapping(value) and part in value:
            value = value[part]
        elif is_sequence(value) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return False, None
    return True, value


def _missing_message(path: str, file: Path) -> str:
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not file.suffix:
        return f"{path} does not exist here; for the Hugging Face data set of that name write {HUB_PREFIX}{path}."
    neighbours = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
    near = get_close_matches(file.name, neighbours, n=1)
    hint = f"did you mean {file.parent / near[0]}?" if near else "check the path, which is relative to where opd runs."
    return f"the prompt file {path} does not exist; {hint}"


def _json_rows(file: Path) -> Iterator[Row]:
    """One object per line; else the whole file as an array of objects, or as objects that span lines."""
    content = _content(file).removeprefix(b"\xef\xbb\xbf").rstrip()
    lines = content.split(b"\n")
    if lines == [b""]:
        return
    whole = None if _is_object(lines[0]) else _objects(content)
    if whole is not None:
        for number, row in enumerate(whole, start=1):
            yield _checked_row(f"item {number} of {file}", row)
        return
    for number, line in enumerate(lines, start=1):
        place = f"line {number} of {file}"
        if not line.strip():
            raise DataError(f"{place} is empty; every line has to be one JSON object. Delete the line.")
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{place} is not UTF-8 (byte {line[error.start]:#04x} at column {error.start + 1}); save it as UTF-8."
            ) from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(
                f"{place} is not JSON ({error}): {_excerpt(line.decode('utf-8'))}. Every line has to be one JSON object."
            ) from error
        yield _checked_row(place, row)


def _content(file: Path) -> bytes:
    try:
        content = file.read_bytes()
        return gzip.decompress(content) if file.suffix == ".gz" else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{file} cannot be unpacked ({error}); check the download, or unpack it with gunzip."
        ) from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}; check its permissions.") from error


def _checked_row(place: str, row: Any) -> Row:
    if not is_mapping(row):
        raise DataError(
            f"{place} is {type_name(row)}, not an object; write it as {{'prompt': …}} with one object per line."
        )
    return place, row


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _objects(content: bytes) -> list[Any] | None:
    """The items of an array, or a sequence of objects with white space between; None for anything else."""
    decoder, end = json.JSONDecoder(), 0
    found: list[Any] = []
    try:
        text = content.decode("utf-8")
        while (start := _NOT_SPACE.search(text, end)) is not None:
            value, end = decoder.raw_decode(text, start.start())
            found.append(value)
    except (ValueError, RecursionError):
        return None
    if len(found) == 1 and is_list(found[0]):
        return found[0]
    return found if all(is_mapping(value) for value in found) else None


def _parquet_rows(file: Path) -> Iterator[Row]:
    pyarrow, parquet = (_extra(name, "pyarrow", "parquet", file) for name in ("pyarrow", "pyarrow.parquet"))
    index = 0
    try:
        source = parquet.ParquetFile(file)
        for group in range(source.num_row_groups):
            for row in _group_rows(source, group, (pyarrow.ArrowNotImplementedError, pyarrow.ArrowCapacityError)):
                yield f"row {index} of {file}", row
                index += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file} cannot be read as parquet ({error}); write it again, or check the download."
        ) from error


def _group_rows(source: Any, group: int, too_large: tuple[type[Exception], ...]) -> Iterator[dict[str, Any]]:
    """The rows of one row group. Arrow holds at most 2 GB of a nested column's text in a batch.

    A group that has more is read again from where it stopped, in smaller batches.
    """
    done, size = 0, BATCH_ROWS
    while True:
        seen = 0
        try:
            for batch in source.iter_batches(batch_size=size, row_groups=[group]):
                seen += batch.num_rows
                if seen > done:
                    yield from batch.slice(batch.num_rows - (seen - done)).to_pylist()
                    done = seen
            return
        except too_large:
            if size == 1:
                raise
            size = max(1, size // FEWER_ROWS)


def _folder_rows(folder: Path, split: str) -> Iterator[Row]:
    if not any((folder / name).exists() for name in ("dataset_dict.json", "dataset_info.json", "state.json")):
        raise DataError(
            f"{folder} is a folder, but not one written by datasets' save_to_disk; name a .jsonl or .parquet file in it."
        )
    datasets = _extra("datasets", "the datasets library", "datasets", folder)
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} cannot be loaded ({error}); write it again with save_to_disk.") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"{folder} has no split {split!r}; set split to one of {', '.join(sorted(loaded))}.")
        loaded = loaded[split]
    for index, row in enumerate(loaded):
        yield f"row {index} of {folder}", row


def _hub_rows(path: str, split: str) -> Iterator[Row]:
    parts = path.removeprefix(HUB_PREFIX).split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise DataError(f"{path!r} is not a data set name; write hub:owner/name, or hub:owner/name/config.")
    datasets = _extra("datasets", "the datasets library", "datasets", path)
    try:
        loaded = datasets.load_dataset("/".join(parts[:2]), *parts[2:], split=split)
    except Exception as error:  # the network, the hub and the data set's own files all fail in their own ways
        raise DataError(
            f"{path} (split {split!r}) cannot be loaded: {error}. Check name, config and split, and that the hub "
            "can be reached; a private data set needs `hf auth login`."
        ) from error
    for index, row in enumerate(loaded):
        yield f"row {index} of {path}", row


def _extra(module: str, name: str, extra: str, path: str | Path) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"reading {path} needs {name}, which is not installed; pip install 'opd[{extra}]'."
        ) from error


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "…")

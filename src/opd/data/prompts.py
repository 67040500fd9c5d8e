"""Prompts: read from JSONL, parquet or a Hugging Face dataset, and dealt out in an order that needs no state.

Every row becomes one `Prompt` or an error that names it: no row is skipped.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from opd.errors import ConfigError, DataError, MissingDependencyError
from opd.types import Prompt

HUB_PREFIX = "hub:"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character, which JSON can spell and no tokenizer can read."""

Row = tuple[str, Mapping[str, Any]]
"""Where a row is, in words, and its columns."""


def load_prompts(
    path: str,
    *,
    prompt_column: str = "prompt",
    answer_column: str = "answer",
    response_column: str = "response",
    teacher_column: str = "teacher",
    split: str = "train",
    limit: int | None = None,
) -> list[Prompt]:
    """The rows of `path`, in file order: a .jsonl or .parquet file, a `datasets` folder, or `hub:owner/name[/config]`.

    A prompt is text, or a list of messages with `role` and `content`. Columns without a role of their own become
    metadata. `split` chooses among the splits of a data set that has them; `limit` keeps the first rows.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit} leaves no prompts; use 1 or more, or leave it out for all rows.")
    columns = _Columns(prompt=prompt_column, answer=answer_column, response=response_column, teacher=teacher_column)
    seen: set[str] = set()
    prompts = []
    for index, (place, row) in enumerate(islice(_rows(path, split), limit)):
        seen.update(row)
        prompts.append(_prompt(index, place, row, columns))
    if not prompts:
        raise DataError(f"{path} has no rows, so there is nothing to sample from; give a data set with prompts.")
    for role, column in columns.optional().items():
        if column != role and column not in seen:
            raise DataError(
                f"no row of {path} has the {role} column {column!r}.{_columns_hint(column, seen)} "
                f"Set {role}_column to one of them."
            )
    return prompts


class PromptOrder:
    """The prompts of every step, as a pure function of (seed, step, count), so that a resumed run needs no state.

    Epoch e is the prompts permuted by (seed, e); steps walk through the epochs laid end to end. A step across the end
    of an epoch may hold a prompt twice.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool = True) -> None:
        if not prompts:
            raise DataError("there are no prompts to take; give a data set with at least one row.")
        self.prompts = tuple(prompts)
        self.seed = seed
        self.shuffle = shuffle

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, step: int, count: int) -> list[Prompt]:
        """The `count` prompts of a step; steps count from 0."""
        assert step >= 0 and count >= 1, (step, count)
        return [self._at(position) for position in range(step * count, (step + 1) * count)]

    def _at(self, position: int) -> Prompt:
        epoch, offset = divmod(position, len(self.prompts))
        if self.shuffle:
            offset = _permutation(len(self.prompts), self.seed, epoch)[offset]
        return self.prompts[offset]


@lru_cache(maxsize=4)  # a step looks at one or two epochs of the training set, and perhaps of an evaluation set
def _permutation(size: int, seed: int, epoch: int) -> list[int]:
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # a text seed is hashed: neighbouring seeds share nothing
    return order


# Rows: one iterator per kind of source.


def _rows(path: str, split: str) -> Iterator[Row]:
    if path.startswith(HUB_PREFIX):
        return _hub_rows(path, split)
    file = Path(path).expanduser()
    if not file.exists():
        raise DataError(_missing_message(path, file))
    if file.is_dir():
        return _folder_rows(file, split)
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    if file.suffix not in readers:
        raise DataError(
            f"{path} ends in {file.suffix or 'no suffix'!r}, which is not a prompt format; use .jsonl (one JSON object "
            "per line), .parquet, a folder written by datasets' save_to_disk, or hub:owner/name."
        )
    return readers[file.suffix](file)


def _missing_message(path: str, file: Path) -> str:
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not file.suffix:
        return f"{path} does not exist here; for the Hugging Face data set of that name write {HUB_PREFIX}{path}."
    neighbours = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
    near = get_close_matches(file.name, neighbours, n=1)
    hint = f"did you mean {file.parent / near[0]}?" if near else "check the path, which is relative to where opd runs."
    return f"the prompt file {path} does not exist; {hint}"


def _jsonl_rows(file: Path) -> Iterator[Row]:
    try:
        lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").rstrip().split(b"\n")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}; check its permissions.") from error
    if lines == [b""]:
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
        if not isinstance(row, dict):
            raise DataError(
                f"{place} is {_type(row)}, not an object; write it as {{'prompt': …}} with one object per line."
            )
        yield place, row


def _parquet_rows(file: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            f"reading {file} needs pyarrow, which is not installed; pip install 'opd[parquet]'."
        ) from error
    index = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield f"row {index} of {file}", row
                index += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file} cannot be read as parquet ({error}); write it again, or check the download."
        ) from error


def _folder_rows(folder: Path, split: str) -> Iterator[Row]:
    if not any((folder / name).exists() for name in ("dataset_dict.json", "dataset_info.json", "state.json")):
        raise DataError(
            f"{folder} is a folder, but not one written by datasets' save_to_disk; name a .jsonl or .parquet file in it."
        )
    datasets = _datasets(str(folder))
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
    datasets = _datasets(path)
    try:
        loaded = datasets.load_dataset("/".join(parts[:2]), *parts[2:], split=split)
    except Exception as error:  # the network, the hub and the data set's own files all fail in their own ways
        raise DataError(
            f"{path} (split {split!r}) cannot be loaded: {error}. Check name, config and split, and that the hub "
            "can be reached; a private data set needs `hf auth login`."
        ) from error
    for index, row in enumerate(loaded):
        yield f"row {index} of {path}", row


def _datasets(path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"reading {path} needs the datasets library, which is not installed; pip install 'opd[datasets]'."
        ) from error
    return datasets


# One row to one prompt.


@dataclass(frozen=True, kw_only=True)
class _Columns:
    prompt: str
    answer: str
    response: str
    teacher: str

    def optional(self) -> dict[str, str]:
        return {"answer": self.answer, "response": self.response, "teacher": self.teacher}


def _prompt(index: int, place: str, row: Mapping[str, Any], columns: _Columns) -> Prompt:
    if columns.prompt not in row:
        raise DataError(
            f"{place} has no column {columns.prompt!r}.{_columns_hint(columns.prompt, row)} "
            "Set prompt_column to the one that holds the prompt."
        )
    value = row[columns.prompt]
    text, messages = None, None
    if isinstance(value, str):
        text = _checked_text(value, place, columns.prompt)
        if not text.strip():
            raise DataError(f"{place}: {columns.prompt!r} is empty, so there is nothing to answer; remove the row.")
    elif isinstance(value, list):
        messages = _messages(value, place, columns.prompt)
    else:
        raise DataError(
            f"{place}: {columns.prompt!r} is {_type(value)}; a prompt is text, or a list of messages with role and content."
        )
    roles = {columns.prompt, columns.answer, columns.response, columns.teacher}
    return Prompt(
        index=index,
        text=text,
        messages=messages,
        answer=_answer(row.get(columns.answer), place, columns.answer),
        response=_optional_text(row.get(columns.response), place, columns.response),
        teacher=_optional_text(row.get(columns.teacher), place, columns.teacher),
        metadata={name: value for name, value in row.items() if name not in roles},
    )


def _messages(value: list[Any], place: str, column: str) -> tuple[dict[str, Any], ...]:
    if not value:
        raise DataError(f"{place}: {column!r} is an empty list of messages; remove the row.")
    messages = []
    for number, message in enumerate(value, start=1):
        where = f"{place}: message {number} of {column!r}"
        if not isinstance(message, Mapping):
            raise DataError(f"{where} is {_type(message)}; write it as {{'role': 'user', 'content': …}}.")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise DataError(f"{where} has no role; set role to system, user or assistant.")
        if not (isinstance(content, str) or (content is None and message.get("tool_calls"))):
            raise DataError(f"{where} has {_type(content)} as its content; only text can be distilled.")
        _checked_text(content or "", place, column)
        # parquet fills the keys that other messages have with null
        messages.append({key: item for key, item in message.items() if item is not None or key == "content"})
    if not any((message["content"] or "").strip() for message in messages):
        raise DataError(
            f"{place}: every message of {column!r} is empty, so there is nothing to answer; remove the row."
        )
    if messages[-1]["role"] == "assistant":
        raise DataError(
            f"{place}: {column!r} ends with a message of the assistant, so there is nothing to answer; "
            "move it to the response column, or end with a message of the user."
        )
    return tuple(messages)


def _answer(value: Any, place: str, column: str) -> str | None:
    if value is None or isinstance(value, str):
        return _optional_text(value, place, column)
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool) and math.isfinite(value):
        return str(int(value)) if value == int(value) else str(value)
    raise DataError(f"{place}: {column!r} is {_type(value)}; an answer is text, a finite number, or null.")


def _optional_text(value: Any, place: str, column: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(f"{place}: {column!r} is {_type(value)}; it has to be text or null.")
    return _checked_text(value, place, column)


def _checked_text(text: str, place: str, column: str) -> str:
    if LONE_SURROGATE.search(text):
        raise DataError(f"{place}: {column!r} holds half a character (a lone surrogate); save the text as UTF-8 again.")
    return text


def _columns_hint(missing: str, present: Mapping[str, Any] | set[str]) -> str:
    near = get_close_matches(missing, list(present), n=1)
    listed = ", ".join(repr(name) for name in sorted(present)) or "none"
    return f" Columns there: {listed}." + (f" Did you mean {near[0]!r}?" if near else "")


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"the number {value}"
    return names.get(type(value), f"a {type(value).__name__}")


def _excerpt(text: str) -> str:
    return text if len(text) <= 60 else text[:60] + "…"

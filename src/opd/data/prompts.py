"""Prompts: one of every row of a file or data set, and dealt out in an order that needs no state.

Every row becomes one `Prompt` or an error that names it: no row is skipped.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from functools import lru_cache
from itertools import islice
from typing import Any

from opd.data.messages import Message, canonical, check_text, content_text, plain, read_arguments, read_messages
from opd.data.rows import given_rows, lookup, read_rows, type_name
from opd.errors import ConfigError, DataError
from opd.types import Prompt

PROMPT_LIKE = (
    "system",
    "system_prompt",
    "instruction",
    "input",
    "context",
    "history",
    "functions",
    "images",
    "image",
    "videos",
)
"""Columns that other trainers make prompts from, and that opd does not read by itself."""


def load_prompts(
    path: str,
    *,
    prompt_column: str = "prompt",
    answer_column: str = "answer",
    response_column: str = "response",
    teacher_column: str = "teacher",
    split: str = "train",
    limit: int | None = None,
    rows: Iterable[Any] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Prompt]:
    """The rows of `path`, in file order: a .jsonl, .json or .parquet file, a `datasets` folder, or `hub:owner/name[/config]`.

    A prompt is text, or a list of messages with `role` and `content`; a last message of the assistant becomes the response. The columns
    `tools`, `documents` and `chat_template_kwargs` go to the chat template. `a.b` names a field of an object. Columns without a role of
    their own become metadata. `split` chooses among the splits of a data set that has them; `limit` keeps the first rows. `rows`
    are read in place of a file, and `path` is then their name in messages: objects with these columns, or the prompts' texts. `say` is
    told what rows hold and prompts do not.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit} leaves no prompts; use 1 or more, or leave it out for all rows.")
    columns = _Columns(prompt=prompt_column, answer=answer_column, response=response_column, teacher=teacher_column)
    source = read_rows(path, split) if rows is None else given_rows(rows, path, prompt_column)
    found: list[_Read] = []
    seen: set[str] = set()
    for index, (place, row) in enumerate(islice(source, limit)):
        found.append(_read(index, place, row, columns))
        for column in columns.optional().values():
            seen |= _names(row, column)
    if not found:
        raise DataError(f"{path} has no rows, so there is nothing to sample from; give a data set with prompts.")
    for role, column in columns.optional().items():
        if column != role and not any(column in one.named for one in found):
            raise DataError(
                f"no row of {path} has the {role} column {column!r}.{_columns_hint(column, seen)} "
                f"Set {role}_column to one of them."
            )
    if say is not None:
        for note in _notes(path, found):
            say(note)
    return [one.prompt for one in found]


def unread_columns(prompts: Sequence[Prompt], path: str, read_elsewhere: str) -> list[str]:
    """A sentence about columns that look like parts of a prompt and are none. `read_elsewhere` holds the names of what else is read."""
    held = {name for prompt in prompts for name in PROMPT_LIKE if prompt.metadata.get(name) not in (None, "", [], {})}
    unread = sorted(name for name in held if not re.search(rf"\b{name}\b", read_elsewhere))
    if not unread:
        return []
    return [
        f"{path} has {', '.join(unread)}, which no prompt holds; write it into the messages, or let prompts.teacher_prompt read it if it "
        "is for the teacher alone."
    ]


def _notes(path: str, found: Sequence[_Read]) -> list[str]:
    """What rows hold and prompts do not."""
    notes = []
    answered = [one for one in found if one.answered]
    if answered:
        notes.append(
            f"{len(answered)} of {len(found)} rows of {path} end with the assistant's answer: the prompt is what comes before it, and the "
            "answer is the reference response."
        )
    lost = sum(one.prompt.response is None or one.prompt.response != _last_turn(one.answered) for one in answered)
    if lost:
        notes.append(
            f"{lost} of these answers are left out: the row has a response of its own, or the answer is more than one text."
        )
    wrong = [one.wrong for one in found if one.wrong]
    if wrong:
        notes.append(f"{wrong[0]}, so no chat template gets it ({_count(len(wrong), 'such row')}).")
    return notes


class PromptSchedule:
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


# One row to one prompt.


@dataclass(frozen=True, kw_only=True)
class _Columns:
    prompt: str
    answer: str
    response: str
    teacher: str

    def optional(self) -> dict[str, str]:
        return {"answer": self.answer, "response": self.response, "teacher": self.teacher}


@dataclass(frozen=True, kw_only=True)
class _Read:
    prompt: Prompt
    answered: tuple[Message, ...]
    """The messages of the assistant after the prompt."""
    named: frozenset[str]
    """Columns with a role that the row has."""
    wrong: str
    """A column for the chat template that cannot be read, in words."""


def _read(index: int, place: str, row: Mapping[str, Any], columns: _Columns) -> _Read:
    there, value = lookup(row, columns.prompt)
    if not there:
        raise DataError(
            f"{place} has no column {columns.prompt!r}.{_columns_hint(columns.prompt, _names(row, columns.prompt))} "
            "Set prompt_column to the one that holds the prompt."
        )
    text, messages, answered = None, None, ()
    value = _untransposed(plain(value) if isinstance(value, bytes) else value)
    if isinstance(value, str):
        text = check_text(value, place, columns.prompt)
        if not text.strip():
            raise DataError(f"{place}: {columns.prompt!r} is empty, so there is nothing to answer; remove the row.")
    elif isinstance(value, list):
        messages, answered = read_messages(value, place, columns.prompt)
    else:
        raise DataError(
            f"{place}: {columns.prompt!r} is {type_name(value)}; a prompt is text, or a list of messages with role and content."
        )
    roles = {columns.prompt, columns.answer, columns.response, columns.teacher}
    arguments, wrong = read_arguments(row)
    response = _optional_text(_spoken(lookup(row, columns.response)[1]), place, columns.response)
    prompt = Prompt(
        index=index,
        text=text,
        messages=messages,
        template_arguments=arguments,
        answer=_answer(lookup(row, columns.answer)[1], place, columns.answer),
        response=_last_turn(answered) if response is None else response,
        teacher=_optional_text(lookup(row, columns.teacher)[1], place, columns.teacher),
        metadata={name: value for name, value in row.items() if name not in roles},
    )
    return _Read(
        prompt=prompt,
        answered=answered,
        named=frozenset(column for column in columns.optional().values() if lookup(row, column)[0]),
        wrong=f"{place}: {wrong[0]}" if wrong else "",
    )


def _untransposed(value: Any) -> Any:
    """Messages that older versions of `datasets` keep as an object of lists."""
    if not isinstance(value, Mapping) or not isinstance(value.get("role", value.get("from")), list):
        return value
    return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]


def _last_turn(answered: tuple[Message, ...]) -> str | None:
    """The assistant's message as a reference response; None where it is more than text."""
    if len(answered) != 1 or "tool_calls" in answered[0]:
        return None
    return content_text(answered[0]["content"]) or None


def _spoken(value: Any) -> Any:
    """The text of a response that is a list of one message of the assistant; anything else as it is."""
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        return value
    messages = tuple(canonical(plain(message)) for message in value)
    text = _last_turn(messages)
    return value if text is None or messages[0].get("role") != "assistant" else text


def _answer(value: Any, place: str, column: str) -> str | None:
    if value is None or isinstance(value, (str, bytes)):
        return _optional_text(value, place, column)
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool) and math.isfinite(value):
        return str(int(value)) if value == int(value) else str(value)
    raise DataError(
        f"{place}: {column!r} is {type_name(value)}; an answer is text, a finite number, or null.{_inside_hint(value, column)}"
    )


def _inside_hint(value: Any, column: str) -> str:
    """Names of what an object or a list holds that could be the answer."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    inside = [f"{column}.{name}" for name, item in items if isinstance(item, (str, int, float))]
    return f" Name what it holds: {', '.join(inside[:5])}." if inside else ""


def _optional_text(value: Any, place: str, column: str) -> str | None:
    value = plain(value) if isinstance(value, bytes) else value
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(
            f"{place}: {column!r} is {type_name(value)}; it has to be text or null.{_inside_hint(value, column)}"
        )
    return check_text(value, place, column)


def _names(row: Mapping[str, Any], missing: str) -> set[str]:
    """The columns of a row, and for a dotted name also what its first column holds."""
    first, dot, _ = missing.partition(".")
    inside = row.get(first)
    nested = {f"{first}.{name}" for name in inside} if dot and isinstance(inside, Mapping) else set()
    return {*row, *nested}


def _columns_hint(missing: str, present: set[str]) -> str:
    near = get_close_matches(missing, list(present), n=1)
    listed = ", ".join(repr(name) for name in sorted(present)) or "none"
    return f" Columns there: {listed}." + (f" Did you mean {near[0]!r}?" if near else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

"""Prompts: one of every row of a file or data set, and a schedule that needs no state.

Every row becomes one `Prompt` or an error that names it: no row is skipped.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from functools import lru_cache
from itertools import islice
from typing import Any

from opd.data.messages import Message, canonical, check_text, content_text, read_arguments, read_messages
from opd.data.row_template import RowTemplate
from opd.data.rows import given_rows, lookup, read_rows
from opd.data.values import is_list, is_mapping, items_of, plain, type_name
from opd.errors import ConfigError, DataError
from opd.types import Prompt

OTHER_NAMES = {
    "prompt": ("messages", "conversations"),
    "answer": ("reward_model.ground_truth",),
    "response": ("completion",),
    "teacher": (),
}
"""Columns of TRL, ShareGPT and verl, which are read where a row lacks the column of opd's own name."""
SYSTEM_ROLES = ("system", "developer")
PROMPT_LIKE = (
    "messages",
    "conversations",
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
"""Columns that other trainers make prompts from: a row whose prompt leaves one of them out is told of."""


def load_prompts(
    path: str,
    *,
    prompt_column: str = "prompt",
    answer_column: str = "answer",
    response_column: str = "response",
    teacher_column: str = "teacher",
    user_message: str | None = None,
    split: str = "train",
    task: Mapping[str, Any] | None = None,
    limit: int | None = None,
    rows: Iterable[Any] | None = None,
    say: Callable[[str], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Prompt]:
    """The rows of `path`, in file order: a .jsonl, .json or .parquet file, a `datasets` folder, `hub:owner/name[/config]`, or
    `reasoning_gym:NAME`, with `task` (size, seed, config, chat).

    A prompt is text, or a list of messages with `role` and `content`; a last message of the assistant becomes the response. A row
    that lacks a column of the default name is read as TRL, ShareGPT or verl write it (`OTHER_NAMES`). The text in a column `system`
    becomes the first of messages that have no system message. The columns `tools`, `documents` and `chat_template_kwargs` go to the
    chat template. `a.b` names a field of an object. Columns without a role become metadata. `user_message` is a Jinja template over
    the columns, and every prompt is then one message of the user with its text. `split` chooses among the splits of a data set that
    has them; `limit` keeps the first rows.
    `rows` are read in place of a file, and `path` is then their name in messages: objects with these columns, or texts.
    `say` receives a sentence about each thing that rows hold and prompts do not, `note` about each that is read from elsewhere.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit} leaves no prompts; use 1 or more, or leave it out for all rows.")
    optional = {"answer": answer_column, "response": response_column, "teacher": teacher_column}
    template = None
    if user_message is not None:
        template = RowTemplate(user_message, key="prompts.user_message", example="question")
    source = read_rows(path, split, task) if rows is None else given_rows(rows, path, prompt_column)
    found: list[_PromptRow] = []
    seen: set[str] = set()
    for index, (place, row) in enumerate(islice(source, limit)):
        found.append(_read(index, place, row, template or prompt_column, optional))
        for column in optional.values():
            seen |= _names(row, column)
    if not found:
        raise DataError(f"{path} has no rows, so there is nothing to sample from; give a data set with prompts.")
    for role, column in optional.items():
        if column != role and not any(column in row.named for row in found):
            raise DataError(
                f"no row of {path} has the {role} column {column!r}.{_columns_hint(column, seen)} "
                f"Set {role}_column to one of them."
            )
    for tell, sentences in ((note, _read_elsewhere(path, found)), (say, _left_out(found))):
        if tell is not None:
            for sentence in sentences:
                tell(sentence)
    return [row.prompt for row in found]


def unread_columns(prompts: Sequence[Prompt], path: str, read_elsewhere: str) -> list[str]:
    """A sentence about columns that look like parts of a prompt and are none, unless `read_elsewhere` names them."""
    held = {
        name
        for prompt in prompts
        for name in PROMPT_LIKE
        if prompt.metadata.get(name) not in (None, "", [], {})
        and not (name == "system" and _opens_with_its_system(prompt))
    }
    unread = sorted(name for name in held if not re.search(rf"\b{name}\b", read_elsewhere))
    if not unread:
        return []
    return [
        f"{path} has {', '.join(unread)}, which no prompt holds; write it into the messages, or let prompts.teacher_prompt read it if it "
        "is for the teacher alone."
    ]


def _opens_with_its_system(prompt: Prompt) -> bool:
    return bool(prompt.messages) and prompt.messages[0] == _system_message(prompt.metadata.get("system"))


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


@dataclass(frozen=True, kw_only=True)
class _PromptRow:
    prompt: Prompt
    answered: tuple[Message, ...]
    """The messages of the assistant after the prompt."""
    named: frozenset[str]
    """Columns with a role that the row has."""
    errors: Mapping[str, str]
    """A sentence by column that is left out."""
    others: Mapping[str, str]
    """Columns of OTHER_NAMES that were read, by their role."""


def _read(
    index: int, place: str, row: Mapping[str, Any], source: str | RowTemplate, optional: Mapping[str, str]
) -> _PromptRow:
    """`source` of the prompt is a column, or the template of the user's message."""
    named = {"prompt": source, **optional} if isinstance(source, str) else optional
    others = _other_names(row, named)
    columns = {**named, **others}
    if isinstance(source, str):
        text, messages, answered = _read_prompt(place, row, columns["prompt"])
    else:
        text, messages, answered = None, (_user_message(place, row, source),), ()
    found = {role: lookup(row, columns[role]) for role in optional}
    arguments, problems = read_arguments(row)
    errors = {problem.split("'")[1]: f"{place}: {problem}, so no chat template gets it" for problem in problems}
    answer = found["answer"][1]
    if "answer" in others and not isinstance(answer, (str, bytes, int, float, Decimal, type(None))):
        # rewards of one's own read it among the metadata
        column = columns["answer"]
        errors[column] = (
            f"{place}: {column!r} is {type_name(answer)}, so it is no answer.{_inside_hint(answer, column)}"
        )
        answer = None
    response = _optional_text(_response(found["response"][1]), place, columns["response"])
    prompt = Prompt(
        index=index,
        text=text,
        messages=_with_system(messages, row.get("system")),
        template_arguments=arguments,
        answer=_answer(answer, place, columns["answer"]),
        response=_last_turn(answered) if response is None else response,
        teacher=_optional_text(found["teacher"][1], place, columns["teacher"]),
        metadata={name: value for name, value in row.items() if name not in columns.values()},
    )
    return _PromptRow(
        prompt=prompt,
        answered=answered,
        named=frozenset(optional[role] for role, (there, _) in found.items() if there),
        errors=errors,
        others=others,
    )


def _other_names(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """For each role whose column has the default name and is not in the row: the first of OTHER_NAMES that is."""
    lacking = [role for role, column in columns.items() if column == role and not lookup(row, column)[0]]
    found = {role: [name for name in OTHER_NAMES[role] if lookup(row, name)[1] is not None] for role in lacking}
    return {role: names[0] for role, names in found.items() if names}


def _with_system(messages: tuple[Message, ...] | None, system: Any) -> tuple[Message, ...] | None:
    """The messages behind the system message of the row's own column, unless they have one."""
    first = _system_message(system)
    if messages is None or first is None or any(message["role"] in SYSTEM_ROLES for message in messages):
        return messages
    return first, *messages


def _system_message(system: Any) -> Message | None:
    return {"role": "system", "content": system} if isinstance(system, str) and system.strip() else None


def _user_message(place: str, row: Mapping[str, Any], template: RowTemplate) -> Message:
    text = check_text(template.filled(row, place), place, template.key)
    if not text.strip():
        raise DataError(
            f"{place}: {template.key} gives an empty message, so there is nothing to answer; remove the row."
        )
    return {"role": "user", "content": text}


def _read_prompt(
    place: str, row: Mapping[str, Any], column: str
) -> tuple[str | None, tuple[Message, ...] | None, tuple[Message, ...]]:
    """Text, or messages and the assistant's messages after them."""
    there, value = lookup(row, column)
    if not there:
        raise DataError(
            f"{place} has no column {column!r}.{_columns_hint(column, _names(row, column))} "
            "Set prompt_column to the one that holds the prompt, or write the user's message with prompts.user_message."
        )
    value = plain(value) if isinstance(value, bytes) else value
    if is_mapping(value) and is_list(value.get("role", value.get("from"))):
        # older versions of `datasets` keep messages as an object of lists
        value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    if isinstance(value, str):
        if not check_text(value, place, column).strip():
            raise DataError(f"{place}: {column!r} is empty, so there is nothing to answer; remove the row.")
        return value, None, ()
    if is_list(value):
        return None, *read_messages(value, place, column)
    raise DataError(
        f"{place}: {column!r} is {type_name(value)}; a prompt is text, or a list of messages with role and content."
    )


def _last_turn(answered: tuple[Message, ...]) -> str | None:
    """The assistant's message as a reference response; None where it is more than text."""
    if len(answered) != 1 or "tool_calls" in answered[0]:
        return None
    return content_text(answered[0]["content"]) or None


def _response(value: Any) -> Any:
    """The text of a response that is a list of one message of the assistant; anything else as it is."""
    if not is_list(value) or not all(is_mapping(message) for message in value):
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


def _optional_text(value: Any, place: str, column: str) -> str | None:
    value = plain(value) if isinstance(value, bytes) else value
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(
            f"{place}: {column!r} is {type_name(value)}; it has to be text or null.{_inside_hint(value, column)}"
        )
    return check_text(value, place, column)


def _inside_hint(value: Any, column: str) -> str:
    """Names of the items of an object or a list that could be the answer."""
    inside = [f"{column}.{name}" for name, item in items_of(value) if isinstance(item, (str, int, float))]
    return f" Name what it holds: {', '.join(inside[:5])}." if inside else ""


def _names(row: Mapping[str, Any], missing: str) -> set[str]:
    """The columns of a row, and for a dotted name also the fields of its first column."""
    first, dot, _ = missing.partition(".")
    inside = row.get(first)
    return {*row, *(f"{first}.{name}" for name in inside)} if dot and is_mapping(inside) else {*row}


def _columns_hint(missing: str, present: set[str]) -> str:
    near = get_close_matches(missing, list(present), n=1)
    listed = ", ".join(repr(name) for name in sorted(present)) or "none"
    return f" Columns there: {listed}." + (f" Did you mean {near[0]!r}?" if near else "")


def _read_elsewhere(path: str, rows: Sequence[_PromptRow]) -> list[str]:
    """Sentences about prompts, answers and responses that are not in a column of their own name."""
    notes: list[str] = []
    for role in OTHER_NAMES:
        found = Counter(row.others[role] for row in rows if role in row.others)
        notes += [f"{n} of {len(rows)} rows of {path} have their {role} in {name!r}." for name, n in found.items()]
    answered = sum(bool(row.answered) for row in rows)
    if answered:
        notes.append(
            f"{answered} of {len(rows)} rows of {path} end with the assistant's answer: the prompt is what comes before it, and the "
            "answer is the reference response."
        )
    return notes


def _left_out(rows: Sequence[_PromptRow]) -> list[str]:
    """Sentences about what rows hold and prompts do not."""
    notes: list[str] = []
    own = [row for row in rows if row.answered]
    lost = sum(row.prompt.response is None or row.prompt.response != _last_turn(row.answered) for row in own)
    if lost:
        notes.append(
            f"{lost} of the assistant's answers after a prompt are left out: the row has a response of its own, or the answer is more "
            "than one text."
        )
    for column in dict.fromkeys(column for row in rows for column in row.errors):
        errors = [row.errors[column] for row in rows if column in row.errors]
        rows_like_it = "1 such row" if len(errors) == 1 else f"{len(errors)} such rows"
        notes.append(f"{errors[0].rstrip('.')} ({rows_like_it}).")
    return notes

"""Chat messages of any usual layout in one form: OpenAI's, ShareGPT's, with content parts, with Arrow's null keys.

A message has `role`, and `content` that is text, a list of text parts, or None. Whoever wrote the row, the same conversation becomes
the same messages.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any

from opd.data.rows import type_name
from opd.errors import DataError

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character, which JSON can spell and no tokenizer can read."""
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
"""What `from` says, and whose message it is."""
EXACT = 2**53
"""Whole numbers up to here are exact as float64."""
RESULT_ROLES = ("tool", "function", "ipython")
"""Who says what a call returned: where that is no text, JSON says it."""
SHAREGPT_CALLS = ("function_call", "tool_call")
TEXT_PARTS = ("text", "input_text", "output_text")
KEY_ORDER = ("id", "type", "function", "name", "description", "parameters", "arguments")
"""Of a tool and of a call, as the OpenAI interface and the servers that follow it write them. Arrow has one order for a whole column."""
TOOL_ARGUMENTS = ("tools", "documents")
"""Columns that a chat template reads as lists of objects."""

Message = dict[str, Any]


def plain(value: Any) -> Any:
    """The value as JSON would hold it, without null keys: Arrow gives every object of a column all keys of the column. So a null
    that is meant has to be inside a text.

    Arrow's maps become objects, dates and times text, decimals numbers, and bytes text where they are UTF-8. A whole number is written
    as one: among numbers that are not whole, Arrow keeps 1 as 1.0.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(item, tuple) and len(item) == 2 for item in value):
            return plain(dict(value))
        return [plain(item) for item in value]
    if isinstance(value, (date, time)):
        return str(value)
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        return _decoded(value)
    if isinstance(value, float) and value.is_integer() and abs(value) <= EXACT:
        return int(value)
    return value


def canonical(message: Mapping[str, Any]) -> Message:
    """The message with `role` and `content`; calls have their arguments as objects. What cannot be read is left as it is."""
    found = dict(message)
    if "role" not in found and "from" in found:
        found = _from_sharegpt(found)
    found["content"] = _content(found.pop("content", None))
    if found.get("role") in RESULT_ROLES and not _is_text(found["content"]):
        found["content"] = json.dumps(found["content"], ensure_ascii=False, default=str)
    calls = found.get("tool_calls")
    if isinstance(calls, str):
        calls = _json(calls, list, calls)
    if isinstance(calls, list):
        found["tool_calls"] = [_call(call) for call in calls]
    if isinstance(found.get("function_call"), dict):
        found["function_call"] = _with_object(found["function_call"])
    return {key: item for key, item in found.items() if key in ("role", "content") or item not in (None, {}, [])}


def content_text(content: Any) -> str:
    """The text of a message's content; parts follow each other."""
    if isinstance(content, (list, tuple)):
        return "".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in content)
    return "" if content is None else str(content)


def read_messages(value: Sequence[Any], place: str, column: str) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """The messages up to the answer, and the assistant's after them. Raises DataError that names the message."""
    if not value:
        raise DataError(f"{place}: {column!r} is an empty list of messages; remove the row.")
    messages = [_read_message(m, f"{place}: message {n} of {column!r}") for n, m in enumerate(value, start=1)]
    if not any(content_text(message["content"]).strip() or "tool_calls" in message for message in messages):
        raise DataError(
            f"{place}: every message of {column!r} is empty, so there is nothing to answer; remove the row."
        )
    asked = len(messages)
    while asked and messages[asked - 1]["role"] == "assistant":
        asked -= 1
    if not asked:
        raise DataError(
            f"{place}: {column!r} holds messages of the assistant alone, so there is nothing to answer; put a message of the user "
            "before them, or remove the row."
        )
    return tuple(messages[:asked]), tuple(messages[asked:])


def read_arguments(columns: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What a row's columns `tools`, `documents` and `chat_template_kwargs` hand to the chat template, and what is wrong with those
    that cannot be read."""
    found: dict[str, Any] = {}
    wrong = []
    kwargs = _object(columns.get("chat_template_kwargs"))
    if kwargs is None:
        wrong.append(f"'chat_template_kwargs' is {type_name(columns['chat_template_kwargs'])} and not an object")
    found |= plain(kwargs or {})  # a null is an argument that is not given
    for name in TOOL_ARGUMENTS:
        items = _object_list(columns.get(name))
        if items is None:
            wrong.append(f"{name!r} is {type_name(columns[name])} and not a list of objects")
        elif items:
            found[name] = [_ordered(item) for item in items] if name == "tools" else items
    return found, wrong


def check_text(text: str, place: str, column: str) -> str:
    """The text itself. Raises DataError where a tokenizer could not read it."""
    if LONE_SURROGATE.search(text):
        raise DataError(f"{place}: {column!r} holds half a character (a lone surrogate); save the text as UTF-8 again.")
    return text


def _read_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{where} is {type_name(message)}; write it as {{'role': 'user', 'content': …}}.")
    author = None if message.get("role") is not None else message.get("from")
    if author is not None and str(author).lower() not in SHAREGPT_ROLES:
        raise DataError(f"{where} is from {author!r}; write one of {', '.join(SHAREGPT_ROLES)}.")
    found = canonical(plain(message))
    if not isinstance(found.get("role"), str) or not found["role"]:
        raise DataError(f"{where} has no role; set role to system, user or assistant.")
    content = found["content"]
    if content is None and found["role"] == "user":
        raise DataError(f"{where} has null as its content; only text can be distilled.")
    if isinstance(content, list):
        odd = next((part for part in content if not _is_text_part(part)), None)
        if odd is not None:
            kind = f"type {odd.get('type')!r}" if isinstance(odd, Mapping) else type_name(odd)
            raise DataError(
                f"{where} has a list as its content, with a part that is {kind}; only text can be distilled. Remove the part or the row."
            )
    elif not isinstance(content, (str, type(None))):
        raise DataError(f"{where} has {type_name(content)} as its content; only text can be distilled.")
    check_text(content_text(content), where, "content")
    return found


def _from_sharegpt(message: Message) -> Message:
    """{"from": "human", "value": "hi"} → {"role": "user", "content": "hi"}; a call in `value` becomes one."""
    author, said = str(message.pop("from")).lower(), message.pop("value", message.pop("content", None))
    found = {"role": SHAREGPT_ROLES.get(author, author), "content": said, **message}
    if author in SHAREGPT_CALLS:
        call = _json(said, (dict, list), None) if isinstance(said, str) else said
        if isinstance(call, (dict, list)) and call:
            calls = call if isinstance(call, list) else [call]
            found |= {"content": None, "tool_calls": [{"type": "function", "function": one} for one in calls]}
    return found


def _content(content: Any) -> Any:
    if isinstance(content, Mapping) and "text" in content:
        content = [content]
    if not isinstance(content, (list, tuple)):
        return content
    if not content:
        return ""
    return [_part(part) for part in content]


def _part(part: Any) -> Any:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, dict) and "text" in part and part.get("type", "text") in TEXT_PARTS:
        return {**part, "type": "text"}
    return part


def _is_text(content: Any) -> bool:
    """Whether it is nothing, a text, or made of parts, of whatever kind."""
    if isinstance(content, list):
        return all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in content)
    return content is None or isinstance(content, str)


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _call(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return _ordered({**call, "function": _with_object(call["function"])})
    return _with_object(call)


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    """Arguments as an object, as chat templates are written for; the text of servers is read."""
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        call = {**call, "arguments": _json(arguments.strip() or "{}", dict, arguments)}
    return _ordered({**call, "arguments": {}} if arguments == [] else call)


def _ordered(value: dict[str, Any]) -> dict[str, Any]:
    """A tool or a call, and the function in it, with their keys in the usual order."""
    if isinstance(value.get("function"), dict):
        value = {**value, "function": _ordered(value["function"])}
    return {key: value[key] for key in (*KEY_ORDER, *value) if key in value}


def _json(text: str, kind: type | tuple[type, ...], otherwise: Any) -> Any:
    """The value that the text spells; `otherwise` where it is no JSON of that kind, or holds numbers JSON has not."""
    try:
        value = json.loads(text, parse_constant=float)
        finite = all(math.isfinite(number) for number in _floats(value))
    except (ValueError, RecursionError):
        return otherwise
    return value if isinstance(value, kind) and finite else otherwise


def _floats(value: Any) -> list[float]:
    if isinstance(value, float):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [number for item in items for number in _floats(item)]


def _object(value: Any) -> dict[str, Any] | None:
    """An object, or the JSON text of one; nothing is an empty one, and None says that it is something else."""
    value = _read(value)
    if value in (None, "", []):
        return {}
    return value if isinstance(value, dict) else None


def _object_list(value: Any) -> list[dict[str, Any]] | None:
    """A list of objects, the JSON text of one, or a list of such texts; None says that it is something else."""
    value = _read(value)
    if value in (None, "", {}):
        return []
    items = [_read(item) for item in (value if isinstance(value, list) else [value])]
    return items if all(isinstance(item, dict) for item in items) else None


def _read(value: Any) -> Any:
    return _json(value, (dict, list, type(None)), value.strip()) if isinstance(value, str) else plain(value)


def _decoded(value: bytes) -> str | bytes:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value

"""Chat messages of any usual layout in one form: OpenAI's, ShareGPT's, with content parts, with Arrow's null keys.

A canonical message has `role`, and `content` that is text, a list of text parts, or None.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from opd.data.values import is_list, is_mapping, is_sequence, parse_json, plain, to_json, type_name
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
"""Values of ShareGPT's `from`, and the role each stands for."""
RESULT_ROLES = ("tool", "function", "ipython")
"""Roles of messages that return a call's result; a result that is no text is written as JSON."""
SHAREGPT_CALLS = ("function_call", "tool_call")
TEXT_PARTS = ("text", "input_text", "output_text")
KEY_ORDER = ("id", "type", "function", "name", "description", "parameters", "arguments")
"""Key order of a tool and of a call in OpenAI's interface. Arrow has one order for a whole column."""
TOOL_ARGUMENTS = ("tools", "documents")
"""Columns that a chat template reads as lists of objects."""

Message = dict[str, Any]


def canonical(message: Mapping[str, Any]) -> Message:
    """The message with `role` and `content`; calls have their arguments as objects. Unreadable values stay as they are."""
    found = dict(message)
    if "role" not in found and "from" in found:
        found = _from_sharegpt(found)
    found["content"] = _content(found.pop("content", None))
    if found.get("role") in RESULT_ROLES and not _is_text(found["content"]):
        found["content"] = to_json(found["content"])
    calls = found.get("tool_calls")
    if isinstance(calls, str):
        calls = parse_json(calls, list, calls)
    if is_list(calls):
        found["tool_calls"] = [_call(call) for call in calls]
    if is_mapping(found.get("function_call")):
        found["function_call"] = _with_object(found["function_call"])
    return {key: item for key, item in found.items() if key in ("role", "content") or item not in (None, {}, [])}


def content_text(content: Any) -> str:
    """The text of a message's content; parts are joined without a separator."""
    if is_sequence(content):
        return "".join(str(part.get("text", "")) if is_mapping(part) else str(part) for part in content)
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
    """The chat template's arguments from the columns `tools`, `documents` and `chat_template_kwargs`, and errors in words."""
    found: dict[str, Any] = {}
    errors: list[str] = []
    kwargs = _object(columns.get("chat_template_kwargs"))
    if kwargs is None:
        errors.append(f"'chat_template_kwargs' is {type_name(columns['chat_template_kwargs'])} and not an object")
    found |= plain(kwargs or {})  # a null is an argument that is not given
    for name in TOOL_ARGUMENTS:
        items = _object_list(columns.get(name))
        if items is None:
            errors.append(f"{name!r} is {type_name(columns[name])} and not a list of objects")
        elif items:
            found[name] = [_ordered(item) for item in items] if name == "tools" else items
    return found, errors


def check_text(text: str, place: str, column: str) -> str:
    """The text itself. Raises DataError where a tokenizer could not read it."""
    if LONE_SURROGATE.search(text):
        raise DataError(f"{place}: {column!r} holds half a character (a lone surrogate); save the text as UTF-8 again.")
    return text


def _read_message(message: Any, where: str) -> Message:
    if not is_mapping(message):
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
    if is_list(content):
        odd = next((part for part in content if not _is_text_part(part)), None)
        if odd is not None:
            kind = f"type {odd.get('type')!r}" if is_mapping(odd) else type_name(odd)
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
        call = parse_json(said, (dict, list), None) if isinstance(said, str) else said
        if (is_mapping(call) or is_list(call)) and call:
            calls = call if is_list(call) else [call]
            found |= {"content": None, "tool_calls": [{"type": "function", "function": one} for one in calls]}
    return found


def _content(content: Any) -> Any:
    if is_mapping(content) and "text" in content:
        content = [content]
    if not is_sequence(content):
        return content
    return [_part(part) for part in content] or ""


def _part(part: Any) -> Any:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if is_mapping(part) and "text" in part and part.get("type", "text") in TEXT_PARTS:
        return {**part, "type": "text"}
    return part


def _is_text(content: Any) -> bool:
    """True for None, text, and lists of typed parts."""
    if is_list(content):
        return all(is_mapping(part) and isinstance(part.get("type"), str) for part in content)
    return content is None or isinstance(content, str)


def _is_text_part(part: Any) -> bool:
    return is_mapping(part) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _call(call: Any) -> Any:
    if not is_mapping(call):
        return call
    if is_mapping(call.get("function")):
        return _ordered({**call, "function": _with_object(call["function"])})
    return _with_object(call)


def _with_object(call: Mapping[str, Any]) -> Message:
    """The call with its arguments as an object, as chat templates expect; JSON text of a server is parsed."""
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        call = {**call, "arguments": parse_json(arguments.strip() or "{}", dict, arguments)}
    return _ordered({**call, "arguments": {}} if arguments == [] else call)


def _ordered(value: Mapping[str, Any]) -> Message:
    """A tool or a call, and the function in it, with their keys in the usual order."""
    if is_mapping(value.get("function")):
        value = {**value, "function": _ordered(value["function"])}
    return {key: value[key] for key in (*KEY_ORDER, *value) if key in value}


def _object(value: Any) -> Mapping[str, Any] | None:
    """An object, or the JSON text of one; empty for an empty value, None for a value of another type."""
    value = _parsed(value)
    if value in (None, "", []):
        return {}
    return value if is_mapping(value) else None


def _object_list(value: Any) -> list[Mapping[str, Any]] | None:
    """A list of objects, the JSON text of one, or a list of such texts; None for a value of another type."""
    value = _parsed(value)
    if value in (None, "", {}):
        return []
    items = [_parsed(item) for item in (value if is_list(value) else [value])]
    return items if all(is_mapping(item) for item in items) else None


def _parsed(value: Any) -> Any:
    return parse_json(value, (dict, list, type(None)), value.strip()) if isinstance(value, str) else plain(value)

"""Other forms of the same conversation, and what of it a rendering holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd.data.messages import RESULT_ROLES, TOOL_ARGUMENTS, Message, content_text

BOOKKEEPING = ("role", "id", "type", "index", "tool_call_id")
"""Keys that tell messages and calls apart; no template has to show them."""
NONE = "None"
"""How Python writes a null."""

Chat = tuple[list[Message], dict[str, Any]]
"""Messages and the template's other arguments."""
Repair = Callable[[Chat], Chat]


@dataclass(frozen=True)
class Leaf:
    """A text somewhere in a chat."""

    label: str
    path: tuple[Any, ...]
    """From (messages, arguments) to the text."""
    text: str


def _empty_content(chat: Chat) -> Chat:
    return [{**m, "content": ""} if m["content"] is None else m for m in chat[0]], chat[1]


def _null_content(chat: Chat) -> Chat:
    """Some templates show the calls of a message only where its content is null."""
    calls = ("tool_calls", "function_call")
    return [
        {**m, "content": None} if m["content"] == "" and any(key in m for key in calls) else m for m in chat[0]
    ], chat[1]


def _text_arguments(chat: Chat) -> Chat:
    def written(call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": written(call["function"])}
        arguments = call.get("arguments")
        return {**call, "arguments": _json(arguments)} if isinstance(arguments, Mapping) else call

    def message(m: Message) -> Message:
        changed = {"tool_calls": [written(call) for call in m["tool_calls"]]} if "tool_calls" in m else {}
        if "function_call" in m:
            changed["function_call"] = written(m["function_call"])
        return {**m, **changed}

    return [message(m) for m in chat[0]], chat[1]


def _content_as_text(chat: Chat) -> Chat:
    return [
        {**m, "content": content_text(m["content"])} if isinstance(m["content"], list) else m for m in chat[0]
    ], chat[1]


def _content_as_parts(chat: Chat) -> Chat:
    def parts(m: Message) -> Message:
        return {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m["content"], str) else m

    return [parts(m) for m in chat[0]], chat[1]


def _wrapped_tools(chat: Chat) -> Chat:
    """{"name": …} → {"type": "function", "function": {"name": …}}."""
    tools = chat[1].get("tools")
    if not tools:
        return chat
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return chat[0], {**chat[1], "tools": wrapped}


REPAIRS: tuple[Repair, ...] = (
    _empty_content,
    _null_content,
    _text_arguments,
    _content_as_text,
    _content_as_parts,
    _wrapped_tools,
)
"""Tried alone, then two at a time, and so on."""


def repaired(chat: Chat, repairs: Iterable[Repair]) -> Chat:
    for repair in repairs:
        chat = repair(chat)
    return chat


# Reading a rendering.


def leaves_of(chat: Chat) -> Iterator[Leaf]:
    """Every text of the messages, of the tools and of the documents that a template should show."""
    for place, message in enumerate(chat[0]):
        named = ("name",) if message.get("role") in RESULT_ROLES else ()  # by the call that it answers
        for key, value in message.items():
            if key not in (*BOOKKEEPING, *named):
                yield from _texts(f"{key} of {message.get('role')} messages", (0, place, key), value)
    for name in TOOL_ARGUMENTS:
        yield from _texts(name, (1, name), chat[1].get(name))


def _texts(label: str, path: tuple[Any, ...], value: Any) -> Iterator[Leaf]:
    if isinstance(value, str) and value.strip():
        yield Leaf(label, path, value)
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if key not in BOOKKEEPING:
            yield from _texts(label, (*path, key), item)


def put(chat: Chat, path: tuple[Any, ...], text: str) -> None:
    inside: Any = chat
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = text


def holds(text: str, leaf: str) -> bool:
    """Whether the text is there, as it is or as JSON writes it."""
    leaf = leaf.strip()
    return leaf in text or _json(leaf)[1:-1] in text or json.dumps(leaf)[1:-1] in text


def structures(messages: Sequence[Message]) -> Iterator[str]:
    """How Python or JSON would write what is no text, where a template takes it for one."""
    for message in messages:
        if isinstance(message["content"], list):
            yield from (str(message["content"]), _json(message["content"]))
        for call in message.get("tool_calls", ()) if isinstance(message.get("tool_calls"), list) else ():
            function = call.get("function", call) if isinstance(call, Mapping) else {}
            arguments = function.get("arguments") if isinstance(function, Mapping) else None
            if isinstance(arguments, Mapping) and str(arguments) != _json(arguments):
                yield str(arguments)
            if isinstance(arguments, str):
                yield _json(arguments)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)

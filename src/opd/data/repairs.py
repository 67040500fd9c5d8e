"""Equivalent forms of a conversation that chat templates may prefer, and its texts, to be looked for in a rendering."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from opd.data.messages import RESULT_ROLES, TOOL_ARGUMENTS, Message, content_text
from opd.data.values import is_list, is_mapping, items_of, to_json

BOOKKEEPING = ("role", "id", "type", "index", "tool_call_id")
"""Keys that tell messages and calls apart; no template has to show them."""
NONE = "None"
"""Python's spelling of a null."""

Chat = tuple[list[Message], dict[str, Any]]
"""Messages, and the other arguments of the template."""
Repair = Callable[[Chat], Chat]


@dataclass(frozen=True)
class Leaf:
    """A text somewhere in a chat."""

    label: str
    path: tuple[Any, ...]
    """Keys from (messages, arguments) to the text."""
    text: str


def _empty_content(chat: Chat) -> Chat:
    return [{**m, "content": ""} if m["content"] is None else m for m in chat[0]], chat[1]


def _null_content(chat: Chat) -> Chat:
    """Some templates show the calls of a message only where its content is null."""

    def message(m: Message) -> Message:
        calls = "tool_calls" in m or "function_call" in m
        return {**m, "content": None} if calls and m["content"] == "" else m

    return [message(m) for m in chat[0]], chat[1]


def _text_arguments(chat: Chat) -> Chat:
    def call(value: Any) -> Any:
        if not is_mapping(value):
            return value
        if is_mapping(value.get("function")):
            return {**value, "function": call(value["function"])}
        arguments = value.get("arguments")
        return {**value, "arguments": to_json(arguments)} if is_mapping(arguments) else value

    def message(m: Message) -> Message:
        changed = {"tool_calls": [call(one) for one in m["tool_calls"]]} if "tool_calls" in m else {}
        if "function_call" in m:
            changed["function_call"] = call(m["function_call"])
        return {**m, **changed}

    return [message(m) for m in chat[0]], chat[1]


def _content_as_text(chat: Chat) -> Chat:
    return [{**m, "content": content_text(m["content"])} if is_list(m["content"]) else m for m in chat[0]], chat[1]


def _content_as_parts(chat: Chat) -> Chat:
    def message(m: Message) -> Message:
        return {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m["content"], str) else m

    return [message(m) for m in chat[0]], chat[1]


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
    """The chat after each repair in turn."""
    for repair in repairs:
        chat = repair(chat)
    return chat


def leaves_of(chat: Chat) -> Iterator[Leaf]:
    """Every text of the messages, tools and documents that a template should show."""
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
    for key, item in items_of(value):
        if key not in BOOKKEEPING:
            yield from _texts(label, (*path, key), item)


def put(chat: Chat, path: tuple[Any, ...], text: str) -> None:
    """Replace the text at the path, in place."""
    inside: Any = chat
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = text


def contains(rendering: str, text: str) -> bool:
    """True when the rendering holds the text, as it is or as JSON writes it."""
    text = text.strip()
    return text in rendering or to_json(text)[1:-1] in rendering or json.dumps(text)[1:-1] in rendering


def misread_structures(messages: Sequence[Message]) -> Iterator[str]:
    """Python's or JSON's spelling of lists and objects, which a rendering holds when its template took them for text."""
    for message in messages:
        content, calls = message["content"], message.get("tool_calls")
        if is_list(content):
            yield from (str(content), to_json(content))
        for call in calls if is_list(calls) else ():
            function: Any = call.get("function", call) if is_mapping(call) else None
            arguments: Any = function.get("arguments") if is_mapping(function) else None
            if is_mapping(arguments) and str(arguments) != to_json(arguments):
                yield str(arguments)
            if isinstance(arguments, str):
                yield to_json(arguments)

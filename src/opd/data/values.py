"""JSON-like values of a row: their types, and one form for the types of Arrow and of JSON texts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import date, time
from decimal import Decimal
from typing import Any, TypeGuard

EXACT = 2**53
"""Whole numbers up to here are exact as float64."""


def is_mapping(value: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping)


def is_list(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def is_sequence(value: object) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return isinstance(value, (list, tuple))


def items_of(value: object) -> list[tuple[Any, Any]]:
    """Keys and values of an object, or indices and items of a list; empty for anything else."""
    if is_mapping(value):
        return list(value.items())
    return list(enumerate(value)) if is_list(value) else []


def type_name(value: object) -> str:
    """The type of a value in words for a message."""
    names: dict[type, str] = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"the number {value}"
    return names.get(type(value), f"a {type(value).__name__}")


def plain(value: Any) -> Any:
    """The value as JSON would hold it, without null keys: Arrow gives every object of a column all keys of the column.

    Arrow's maps become objects, dates and times text, decimals numbers, and bytes text where they are UTF-8. A whole number
    is written as one: among numbers that are not whole, Arrow keeps 1 as 1.0.
    """
    if is_mapping(value):
        return {str(key): plain(item) for key, item in value.items() if item is not None}
    if is_sequence(value):
        if value and all(_is_pair(item) for item in value):
            return plain(dict(value))
        return [plain(item) for item in value]
    if isinstance(value, (date, time)):
        return str(value)
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, float) and value.is_integer() and abs(value) <= EXACT:
        return int(value)
    return value


def parse_json(text: str, kind: type | tuple[type, ...], otherwise: Any) -> Any:
    """The value that the text spells; `otherwise` for text that is no JSON of that kind, or holds NaN or an infinity."""
    try:
        value = json.loads(text, parse_constant=float)
        valid = isinstance(value, kind) and _is_finite(value)
    except (ValueError, RecursionError):
        return otherwise
    return value if valid else otherwise


def to_json(value: Any) -> str:
    """The value as JSON text; dates and other types that JSON lacks are written as text."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2  # pyright: ignore[reportUnknownArgumentType]


def _is_finite(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return all(_is_finite(item) for _, item in items_of(value))

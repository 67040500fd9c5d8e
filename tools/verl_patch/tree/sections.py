"""Sections of settings in the patch: they stand in for `opd.config.sections`, which checks types with pydantic and guesses at typos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from numbers import Real
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from opd.errors import ConfigError

T = TypeVar("T")


class Section:
    """Base class: a subclass is a frozen, keyword-only dataclass."""

    place: ClassVar[str] = ""

    def __init_subclass__(cls, *, key: str = "") -> None:
        dataclass(frozen=True, kw_only=True)(cls)


def parse_section(section: type[T], data: Mapping[str, Any], prefix: str = "") -> T:
    """The section with the values of `data`. Raises ConfigError for keys that nothing reads, and for values of another type."""
    hints, names = get_type_hints(section), [one.name for one in fields(section)]  # pyright: ignore[reportArgumentType]
    for key in data:
        if key not in names:
            raise ConfigError(f"Unknown key '{prefix}{key}'. Keys of section '{prefix[:-1]}': {', '.join(names)}.")
    return section(**{key: _value(hints[key], value, f"{prefix}{key}") for key, value in data.items()})


def _value(hint: Any, value: Any, dotted: str) -> Any:
    kinds = get_args(hint) or (hint,)
    section = next((kind for kind in kinds if is_dataclass(kind)), None)
    if not (_fits(hint, value) if section is None else isinstance(value, Mapping)):
        raise ConfigError(f"'{dotted}' cannot be {value!r}; it is a {'section' if section else f'value of {hint}'}.")
    if section is None:
        return value
    if get_origin(hint) is dict:
        return {name: _value(section, one, f"{dotted}.{name}") for name, one in value.items()}
    return parse_section(section, value, f"{dotted}.")  # pyright: ignore[reportArgumentType]


def _fits(hint: Any, value: Any) -> bool:
    kinds, origin = get_args(hint), get_origin(hint)
    if origin is Literal:
        return value in kinds
    if origin is dict:
        return isinstance(value, Mapping) and all(_fits(kinds[1], one) for one in value.values())
    if kinds:
        return any(_fits(kind, value) for kind in kinds)
    return isinstance(value, Real) and not isinstance(value, bool) if hint is float else isinstance(value, hint)

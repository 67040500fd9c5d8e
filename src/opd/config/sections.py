"""The sections of a recipe as classes: each takes its keys by name, with values that are of their types or become so.

A recipe file, the command line and Python come the same way: unknown keys are refused with the nearest known name, pydantic checks
types, a dict becomes the section that it stands for, then the section's own rules run.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from opd.errors import ConfigError, ObjectiveError, OpdError, did_you_mean

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError


class _Typed(type):
    """Settles the values before the dataclass gets them. pydantic, which has checked them itself, and copies do not come this way."""

    if not TYPE_CHECKING:  # to a type checker the call is that of the dataclass

        def __call__(cls, *args: Any, **given: Any) -> Any:
            if args:
                first = dataclasses.fields(cls)[0].name
                raise ConfigError(
                    f"{cls.__name__} takes its keys by name, e.g. {cls.__name__}({first}=…), not {args[0]!r}."
                )
            return super().__call__(**settled(cls, given))


class Section(metaclass=_Typed):
    """Base of the frozen dataclasses that a recipe is made of. Raises ConfigError for keys and values that it cannot take."""

    _whole: type | None = None

    def __init_subclass__(cls, *, whole: bool = False) -> None:
        if whole:
            Section._whole = cls


def settled(section: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of these keys, each of its type. Raises ConfigError saying what, why and what to do."""
    prefix = _prefix_of(section)
    refuse_unknown_keys(section, given, prefix)
    for item in dataclasses.fields(section):
        if item.name not in given and item.default is item.default_factory is dataclasses.MISSING:
            raise ConfigError(_not_set(f"{prefix}{item.name}"))
    values = lists_to_tuples(section, _paths_to_text(given))
    return {key: _checked(section, key, value, prefix) for key, value in values.items()}


def _checked(section: type, key: str, value: Any, prefix: str) -> Any:
    from pydantic import ValidationError

    try:
        return _adapter(section, key).validate_python(value)
    except ValidationError as error:
        raise explain(error, tuple(f"{prefix}{key}".split("."))) from None


@cache
def _adapter(section: type, key: str) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(get_type_hints(section)[key])


def _paths_to_text(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _paths_to_text(inner) for key, inner in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def whole_keys() -> list[str]:
    """Every key of a recipe."""
    return all_keys(Section._whole) if Section._whole is not None else []


def hint_of(dotted: str) -> Any:
    """The type of a section or key of a recipe, and None for one that does not exist."""
    annotation: Any = Section._whole
    for part in dotted.split("."):
        section, named = section_of(annotation), sections_by_name(annotation)
        if named is not None:
            annotation = named  # `part` is the name of a teacher
        elif section is not None:
            annotation = get_type_hints(section).get(part)
        else:
            return None
    return annotation


@cache
def _prefix_of(section: type) -> str:
    """Where a section stands in a recipe: "student.lora." """

    def search(whole: type, prefix: str) -> str | None:
        for item in dataclasses.fields(whole):
            child = section_of(get_type_hints(whole)[item.name])
            if child is section:
                return f"{prefix}{item.name}."
            found = None if child is None else search(child, f"{prefix}{item.name}.")
            if found is not None:
                return found
        return None

    whole = Section._whole
    return "" if whole is None or section is whole else search(whole, "") or ""


def sections_by_name(annotation: Any) -> type | None:
    """The dataclass in `dict[str, Section]`."""
    if get_origin(annotation) is not dict:
        return None
    section = get_args(annotation)[1]
    return section if dataclasses.is_dataclass(section) and isinstance(section, type) else None


def section_of(annotation: Any) -> type | None:
    """The dataclass in `Section` or `Section | None`."""
    if get_origin(annotation) is dict:
        return None
    candidates = get_args(annotation) if get_origin(annotation) is not None else (annotation,)
    return next((c for c in candidates if dataclasses.is_dataclass(c) and isinstance(c, type)), None)


def refuse_unknown_keys(section: type, data: Any, prefix: str) -> None:
    if not isinstance(data, Mapping):
        return  # the type check says what is wrong
    hints = get_type_hints(section)
    names = [f.name for f in dataclasses.fields(section)]
    for key, value in data.items():
        if key not in names:
            raise ConfigError(_unknown(f"{prefix}{key}", str(key), names, prefix))
        child, named = section_of(hints[key]), sections_by_name(hints[key])
        if named is not None and isinstance(value, Mapping):
            for name, section_of_it in value.items():
                if not isinstance(section_of_it, (Mapping, named)):
                    example = f"{prefix}{key}.{name}.{dataclasses.fields(named)[0].name}"
                    raise ConfigError(
                        f"'{prefix}{key}.{name}' is a section and cannot be {section_of_it!r}; set its keys, e.g. --{example} VALUE."
                    )
                refuse_unknown_keys(named, section_of_it, f"{prefix}{key}.{name}.")
        elif child is not None:
            optional = child is not hints[key]
            if not isinstance(value, (Mapping, child)) and not (optional and value is None):
                what = "is empty" if value is None else f"cannot be {value!r}"
                example = f"{prefix}{key}.{dataclasses.fields(child)[0].name}"
                raise ConfigError(f"'{prefix}{key}' is a section and {what}; set its keys, e.g. --{example} VALUE.")
            refuse_unknown_keys(child, value, f"{prefix}{key}.")
        elif isinstance(value, bool) and {int, float} & {hints[key], *get_args(hints[key])}:
            raise ConfigError(f"'{prefix}{key}' cannot be {str(value).lower()}: it is a number; write one.")


def all_keys(section: type, prefix: str = "") -> list[str]:
    hints = get_type_hints(section)
    keys = []
    for item in dataclasses.fields(section):
        child, named = section_of(hints[item.name]), sections_by_name(hints[item.name])
        if named is not None:
            keys += all_keys(named, f"{prefix}{item.name}.NAME.")
        else:
            keys += all_keys(child, f"{prefix}{item.name}.") if child else [f"{prefix}{item.name}"]
    return keys


def _unknown(dotted: str, key: str, names: Sequence[str], prefix: str) -> str:
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    suggestion = f"{prefix}{near[0]}" if near else None
    if suggestion is None:  # right name, wrong section?
        elsewhere = [k for k in whole_keys() if k.rsplit(".", 1)[-1] == key]
        near_all = elsewhere or difflib.get_close_matches(dotted, whole_keys(), n=1, cutoff=0.6)
        suggestion = near_all[0] if near_all else None
    hint = f" Did you mean '{suggestion}'?" if suggestion else ""
    where = f"section '{prefix[:-1]}'" if prefix else "a recipe"
    return f"Unknown key '{dotted}'.{hint} Keys of {where}: {', '.join(names)}."


def lists_to_tuples(section: type, data: Any) -> Any:
    """A single value where the field is a tuple becomes a tuple of one: `--rollout.stop END` is `stop: [END]`."""
    if not isinstance(data, Mapping):
        return data
    hints = get_type_hints(section)
    out: dict[str, Any] = {}
    for key, value in data.items():
        child, named = section_of(hints[key]), sections_by_name(hints[key])
        if child is not None:
            out[key] = lists_to_tuples(child, value)
        elif named is not None and isinstance(value, Mapping):
            out[key] = {name: lists_to_tuples(named, section_of_it) for name, section_of_it in value.items()}
        elif get_origin(hints[key]) is tuple and not isinstance(value, (list, tuple)) and value is not None:
            out[key] = (value,)
        else:
            out[key] = value
    return out


def _not_set(dotted: str) -> str:
    section = section_of(hint_of(dotted))
    key = f"{dotted}.{dataclasses.fields(section)[0].name}" if section else dotted
    return f"'{dotted}' is not set, and has no default. Add it to the recipe or pass --{key} VALUE."


def explain(error: ValidationError, place: tuple[str, ...] = ()) -> OpdError:
    """A section's own refusal as it is, and pydantic's as a ConfigError that names the key, which lies in `place`."""
    first = error.errors()[0]
    loc = (*place, *first["loc"])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, OpdError):
        return type(cause)(f"objective: {cause}") if isinstance(cause, ObjectiveError) else cause
    dotted = ".".join(str(part) for part in loc)
    if dotted == "objective.tail" and first["input"] == "ignore":
        return _no_ignored_tail()
    if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        if isinstance(loc[-1], int):  # a tuple of fixed length
            whole = ".".join(map(str, loc[:-1]))
            return ConfigError(
                f"'{whole}' has too few values, {first['input']!r}; the default shows how many it takes."
            )
        return ConfigError(_not_set(dotted))
    more = f" ({error.error_count() - 1} more after it)" if error.error_count() > 1 else ""
    hint = ""
    if first["type"] == "literal_error":
        hint = did_you_mean(str(first["input"]), re.findall(r"'([^']*)'", first["msg"]))
    elif first["type"] == "string_type" and first["input"] is not None and not callable(first["input"]):
        hint = " Put it in quotes if it is meant as text."
    problem = first["msg"][0].lower() + first["msg"][1:]
    return ConfigError(f"'{dotted}' cannot be {first['input']!r}: {problem}{more}.{hint}")


def _no_ignored_tail() -> OpdError:
    """Not a misspelling but a loss in wide use: the objective itself says why it has none of it."""
    from opd.losses import Objective

    try:
        Objective(support="teacher_top_k", tail="ignore")  # pyright: ignore[reportArgumentType]
    except ObjectiveError as error:
        return ObjectiveError(f"objective: {error}")
    raise AssertionError("an objective has learnt to ignore the tail")

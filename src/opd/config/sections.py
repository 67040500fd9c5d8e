"""`Section`: the frozen dataclasses that a recipe is made of, and `parse_section`, which makes one from a mapping.

A recipe file, the command line, Python and verl's `opd:` section come the same way. Unknown keys are refused with the nearest known
name; pydantic checks the type of every value; a mapping becomes the section that it stands for; then each section's own rules run.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast, get_args, get_origin, get_type_hints

from typing_extensions import dataclass_transform

from opd.errors import ConfigError, ObjectiveError, OpdError, did_you_mean

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
class Section:
    """Base class: a subclass is a frozen, keyword-only dataclass whose constructor checks keys and types.

    `class TrainConfig(Section, key="train")` stands under `train:` in a recipe; error messages name its keys so.
    Raises ConfigError for keys and values that it cannot take. Copies, which hold checked values already, skip the check.
    """

    place: ClassVar[str] = ""
    """The key with a dot at its end, for the messages of rules."""

    def __init_subclass__(cls, *, key: str = "") -> None:
        cls.place = f"{key}." if key else ""
        dataclass(frozen=True, kw_only=True)(cls)
        plain_init = cast(Any, cls.__init__)

        def checked_init(self: Section, *args: Any, **given: Any) -> None:
            if args:
                first = fields(cast(Any, cls))[0].name
                raise ConfigError(
                    f"{cls.__name__} takes its keys by name, e.g. {cls.__name__}({first}=…), not {args[0]!r}."
                )
            plain_init(self, **_checked_values(cls, given, cls.place, _Tree(cls, cls.place)))

        cls.__init__ = checked_init

    def _fill_in(self, **values: Any) -> None:
        """In `__post_init__` alone: the values that None stands for, so that config.yaml says them."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


def parse_section(section: type[T], data: Mapping[str, Any], prefix: str = "") -> T:
    """The section with the values of `data`, whose nested mappings become nested sections.

    `section` is a `Section` or another dataclass, such as `Objective`. `prefix` says where the mapping stands in the config of another
    program, e.g. "opd.": messages then name keys as `opd.rl.weight`, and show `opd.rl.weight=VALUE` for `--rl.weight VALUE`.
    Raises ConfigError, or a section's own OpdError, that says what, why and what to do.
    """
    return _parse(section, data, prefix, _Tree(section, prefix, foreign=bool(prefix)))


def all_keys(section: type, prefix: str = "") -> list[str]:
    """Every dotted key below a section; NAME stands for the name of a section in `dict[str, Section]`."""
    keys: list[str] = []
    for name, hint in _hints(section).items():
        named, child = sections_by_name(hint), section_of(hint)
        if named is not None:
            keys += all_keys(named, f"{prefix}{name}.NAME.")
        else:
            keys += all_keys(child, f"{prefix}{name}.") if child is not None else [f"{prefix}{name}"]
    return keys


def hint_of(section: type, dotted: str) -> Any:
    """The type of a key below a section, and None for a key that does not exist."""
    hint: Any = section
    for part in dotted.split("."):
        child, named = section_of(hint), sections_by_name(hint)
        if named is None and child is None:
            return None
        hint = named if named is not None else _hints(cast(type, child)).get(part)
    return hint


def section_of(hint: Any) -> type | None:
    """The dataclass in `Section` or `Section | None`."""
    if get_origin(hint) is dict:
        return None
    candidates = get_args(hint) if get_origin(hint) is not None else (hint,)
    return next((c for c in candidates if isinstance(c, type) and is_dataclass(c)), None)


def sections_by_name(hint: Any) -> type | None:
    """The dataclass in `dict[str, Section]`."""
    return section_of(get_args(hint)[1]) if get_origin(hint) is dict else None


@dataclass(frozen=True)
class _Tree:
    """The whole that error messages speak of: its class, its place, and whether another program's config holds it."""

    root: type
    at: str
    foreign: bool = False

    def example(self, key: str) -> str:
        """The words that set this key."""
        return f"{key}=VALUE" if self.foreign else f"--{key} VALUE"

    def renamed(self, message: str) -> str:
        """A rule's message, which has a recipe's keys, each with its place before it."""
        if not self.foreign:
            return message
        keys = "|".join(re.escape(key) for key in sorted(all_keys(self.root), key=len, reverse=True))
        message = re.sub(rf"--({keys}) VALUE", rf"{self.at}\1=VALUE", message)
        return re.sub(rf"(?<![\w.])({keys})\b", rf"{self.at}\1", message)


def _parse(section: type[T], data: Mapping[str, Any], at: str, tree: _Tree) -> T:
    return _made(section, _checked_values(section, data, at, tree), at, tree)


def _made(section: type[T], values: Mapping[str, Any], at: str, tree: _Tree) -> T:
    """The section, by its own rules."""
    try:
        return section(**values)
    except ObjectiveError as error:
        raise ObjectiveError(f"{tree.at if tree.foreign else ''}objective: {error}") from None
    except OpdError as error:
        raise type(error)(tree.renamed(str(error))) from None


def _checked_values(section: type, data: Mapping[str, Any], at: str, tree: _Tree) -> dict[str, Any]:
    """The values by key, each of its type; `at` is the dotted place of the section, with a dot at its end."""
    hints = _hints(section)
    for key in data:
        if key not in hints:
            raise ConfigError(_unknown_key(at, str(key), list(hints), tree))
    values = {key: _checked_value(section, key, value, at, tree) for key, value in data.items()}
    for name in _required(section):
        if name not in data:
            raise ConfigError(_not_set(f"{at}{name}", hints[name], tree))
    return values


def _checked_value(section: type, key: str, value: Any, at: str, tree: _Tree) -> Any:
    hint, dotted = _hints(section)[key], f"{at}{key}"
    child, named = section_of(hint), sections_by_name(hint)
    if named is not None and isinstance(value, Mapping):
        several = cast("Mapping[Any, Any]", value)
        return {str(name): _subsection(named, one, f"{dotted}.{name}", tree) for name, one in several.items()}
    if child is not None:
        optional = child is not hint
        return None if value is None and optional else _subsection(child, value, dotted, tree)
    if isinstance(value, bool) and {int, float} & {hint, *get_args(hint)}:
        raise ConfigError(f"'{dotted}' cannot be {str(value).lower()}: it is a number; write one.")
    from pydantic import ValidationError

    try:
        return _adapter(section, key).validate_python(wrap_scalar(hint, _paths_to_text(value)))
    except ValidationError as error:
        if key == "tail" and value == "ignore":
            _made(section, {key: value}, at, tree)  # a loss in wide use: the objective itself says why it is refused
        raise _wrong_value(error, dotted) from None


def _subsection(section: type, value: Any, dotted: str, tree: _Tree) -> Any:
    if isinstance(value, section):
        return value
    if isinstance(value, Mapping):
        return cast("Any", _parse(section, cast("Mapping[str, Any]", value), f"{dotted}.", tree))
    what = "is empty" if value is None else f"cannot be {value!r}"
    example = tree.example(f"{dotted}.{next(iter(_hints(section)))}")
    raise ConfigError(f"'{dotted}' is a section and {what}; set its keys, e.g. {example}.")


def wrap_scalar(hint: Any, value: Any) -> Any:
    """A single value where the key takes a tuple becomes a tuple of one: `--rollout.stop END` is `stop: [END]`."""
    wraps = get_origin(hint) is tuple and type(value) not in (list, tuple, type(None))
    return (value,) if wraps else value


def _paths_to_text(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _paths_to_text(inner) for key, inner in cast("Mapping[Any, Any]", value).items()}
    return value.__fspath__() if hasattr(value, "__fspath__") else value


@cache
def _hints(section: type) -> dict[str, Any]:
    """The type of every key of a section, in order."""
    hints = get_type_hints(section)
    return {item.name: hints[item.name] for item in fields(cast(Any, section))}


@cache
def _adapter(section: type, key: str) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(_hints(section)[key])


def _required(section: type) -> Iterator[str]:
    for item in fields(cast(Any, section)):
        if item.default is MISSING and item.default_factory is MISSING:
            yield item.name


def _not_set(dotted: str, hint: Any, tree: _Tree) -> str:
    child = section_of(hint)
    key = dotted if child is None else f"{dotted}.{next(iter(_hints(child)))}"
    return f"'{dotted}' is not set, and has no default. Add it to the recipe or pass {tree.example(key)}."


def _unknown_key(at: str, key: str, names: list[str], tree: _Tree) -> str:
    near = _keys_like(at, key, names, all_keys(tree.root, tree.at))
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    where = f"section '{at[:-1]}'" if at else "a recipe"
    return f"Unknown key '{at}{key}'.{hint} Keys of {where}: {', '.join(names)}."


def suggested_keys(root: type, dotted: str, prefix: str = "") -> list[str]:
    """The keys that an unknown dotted key may stand for, all of them below `prefix`, where `root` stands."""
    at, _, key = dotted.removeprefix(prefix).rpartition(".")
    section = section_of(hint_of(root, at)) if at else root
    names = list(_hints(section)) if section is not None else []
    return _keys_like(f"{prefix}{at}." if at else prefix, key, names, all_keys(root, prefix))


def _keys_like(at: str, key: str, names: list[str], everywhere: list[str]) -> list[str]:
    """Keys of this section that hold the word or are spelled like it; else such keys of other sections."""

    def holds(dotted: str) -> bool:
        return f"_{key}_" in f"_{dotted.rpartition('.')[2]}_"

    near = [f"{at}{name}" for name in difflib.get_close_matches(key, names, n=1, cutoff=0.6)]
    near = near or [dotted for dotted in everywhere if dotted.rpartition(".")[2] == key][:1]
    near = near or [dotted for dotted in everywhere if holds(dotted)]
    if not near:
        by_name = {dotted.rpartition(".")[2]: dotted for dotted in reversed(everywhere)}
        near = [by_name[name] for name in difflib.get_close_matches(key, by_name, n=1, cutoff=0.6)]
    return near or difflib.get_close_matches(f"{at}{key}", everywhere, n=1, cutoff=0.8)


def _wrong_value(error: ValidationError, dotted: str) -> ConfigError:
    """pydantic's refusal of the value at `dotted`."""
    first = error.errors()[0]
    if first["type"] == "missing":  # of a tuple of fixed length
        return ConfigError(f"'{dotted}' has too few values, {first['input']!r}; the default shows how many it takes.")
    hint = ""
    if first["type"] == "literal_error":
        hint = did_you_mean(str(first["input"]), re.findall(r"'([^']*)'", first["msg"]))
    elif first["type"] == "string_type" and first["input"] is not None and not callable(first["input"]):
        hint = " Put it in quotes if it is meant as text."
    more = f" ({error.error_count() - 1} more after it)" if error.error_count() > 1 else ""
    key = ".".join((dotted, *map(str, first["loc"])))
    return ConfigError(
        f"'{key}' cannot be {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}{more}.{hint}"
    )

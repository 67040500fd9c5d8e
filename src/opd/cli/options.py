"""Options of the commands that take a few: one table each, from which words are read, help is printed and shells complete."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from opd.errors import ConfigError

Kind = Literal["flag", "text", "path", "count", "number"]
LOWEST = {"count": 1, "number": 0}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a command."""

    name: str
    """With its dashes."""
    help: str
    kind: Kind = "text"
    value: str = ""
    """The word that stands for its value in the help; for a count it is N."""
    short: str = ""
    lowest: int | None = None
    """Of a count or a number; by default 1 and 0."""

    @property
    def key(self) -> str:
        return self.name.strip("-").replace("-", "_")

    @property
    def shown(self) -> str:
        """The option with its value, as the help has it."""
        value = "" if self.kind == "flag" else f" {self.value or {'count': 'N', 'number': 'X'}.get(self.kind, 'TEXT')}"
        return f"{self.short}, {self.name}{value}" if self.short else f"{self.name}{value}"


@dataclass(frozen=True, kw_only=True)
class Command:
    """What a command takes."""

    usage: str
    about: str
    options: tuple[Option, ...] = ()
    takes_recipe_keys: bool = False
    """`--section.key value` goes to the recipe."""

    @property
    def help(self) -> str:
        """The text of `--help`."""
        width = max((len(option.shown) for option in self.options), default=0)
        lines = [f"{option.shown:<{width}}  {option.help}" for option in self.options]
        if self.takes_recipe_keys:
            lines.append("--section.key VALUE: any key of a recipe, see opd train --help")
        return "\n\n".join(part for part in (f"usage: {self.usage}", self.about, "\n".join(lines)) if part)


@dataclass(frozen=True, kw_only=True)
class Given:
    """The words of a command line, read."""

    words: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """By the option's name without dashes; of a flag, True."""
    recipe: tuple[str, ...] = ()
    """`--section.key value` and what follows it."""

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)


def read_one(command: Command, args: Sequence[str], what: str) -> Given | None:
    """What a command is given that takes one `what`; None where help was asked for, which is printed. Raises ConfigError as `read` does,
    and for another number of names."""
    if "-h" in args or "--help" in args:
        print(command.help)
        return None
    given = read(command, args)
    if len(given.words) != 1:
        raise ConfigError(f"Give one {what}, not {len(given.words)}: {command.usage}")
    return given


def read(command: Command, args: Sequence[str]) -> Given:
    """Raises ConfigError for an option that the command lacks, one given twice, and a value that is missing or of another kind."""
    known = {name: option for option in command.options for name in (option.name, option.short) if name}
    words: list[str] = []
    values: dict[str, Any] = {}
    recipe: list[str] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        option = known.get(name)
        if option is None:
            if not word.startswith("-") or word == "-":
                words.append(word)
                continue
            if not command.takes_recipe_keys or "." not in name:
                raise ConfigError(_no_such_option(command, name))
            recipe.append(word)
            while not equals and rest and not rest[0].startswith("--") and rest[0] not in known:
                recipe.append(rest.pop(0))
            continue
        if option.key in values:
            raise ConfigError(f"{option.name} is there twice; give it once.")
        if option.kind == "flag":
            if equals:
                raise ConfigError(f"{option.name} takes no value; write {option.name} alone.")
            values[option.key] = True
            continue
        if not equals:
            if not rest or _is_option(rest[0], known):
                raise ConfigError(f"{option.name} needs a value: {option.shown}. Usage: {command.usage}")
            value = rest.pop(0)
        values[option.key] = _value(option, value)
    return Given(words=tuple(words), values=values, recipe=tuple(recipe))


def _is_option(word: str, known: Mapping[str, Option]) -> bool:
    return word.startswith("--") or word.partition("=")[0] in known


def _value(option: Option, text: str) -> Any:
    if option.kind in ("text", "path"):
        if not text.strip():
            raise ConfigError(f"{option.name} is empty; write {option.shown}.")
        return text
    lowest = LOWEST[option.kind] if option.lowest is None else option.lowest
    whole = option.kind == "count"
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number < lowest:
        raise ConfigError(
            f"{option.name} takes a {'whole number' if whole else 'number'} from {lowest} up, not '{text}'."
        )
    return number


def _no_such_option(command: Command, name: str) -> str:
    names = [option.name for option in command.options]
    near = get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"There is no option {name} here.{hint} Usage: {command.usage}"

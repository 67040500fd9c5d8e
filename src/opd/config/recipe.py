"""Recipe files and `--section.key value` overrides → a `Config`.

One route in: YAML and overrides are merged, unknown keys are refused with the nearest known name, types are checked by pydantic,
then each section's own rules run. Nothing here starts a model.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import yaml

from opd.config.run import RunSettings
from opd.config.sections import all_keys, hint_of, parse_section
from opd.config.words import merge, read_recipe, scalar
from opd.errors import ConfigError
from opd.losses.choices import READ_BY

if TYPE_CHECKING:
    from opd.config import Config


def whole_keys() -> list[str]:
    """Every key of a recipe."""
    return all_keys(RunSettings)


def parse_overrides(args: Sequence[str]) -> dict[str, Any]:
    """`--section.key value` pairs as a flat dict of dotted keys. Values are read as YAML; several values make a list."""
    overrides: dict[str, Any] = {}
    index = 0
    while index < len(args):
        name = args[index]
        if not name.startswith("--") or len(name) == 2:
            raise ConfigError(
                f"Unexpected argument '{name}'. Overrides look like --section.key value, e.g. --train.steps 50."
            )
        index += 1
        if "=" in name:
            name, _, value = name.partition("=")
            values = [value]
        else:
            start = index
            while index < len(args) and not args[index].startswith("--"):
                index += 1
            values = list(args[start:index])
        if not values:
            near = difflib.get_close_matches(name, FLAGS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{name} needs a value, e.g. {name} VALUE.{hint}")
        for value in values[1:]:
            if value.lstrip("-").partition("=")[0] in whole_keys():
                raise ConfigError(f"'{value}' after {name} looks like a key of its own; write --{value.lstrip('-')}.")
        key = name[2:].replace("-", "_")
        read = _reader(key)
        parsed = [read(value) for value in values]
        overrides[key] = parsed[0] if len(parsed) == 1 else parsed
    return overrides


FLAGS = ("--resume", "--overwrite", "--debug")
"""Words on the command line that take no value."""


def _reader(dotted: str) -> Callable[[str], Any]:
    """The reader of a key's words: YAML, or word for word where the key takes text alone. A path may hold what is a list, a comment
    or a date to YAML."""
    annotation = hint_of(RunSettings, dotted)
    kinds = set(get_args(annotation)) or {annotation}
    if str not in kinds or not kinds <= {str, type(None), Ellipsis}:
        return scalar
    return partial(_text, several=Ellipsis in kinds)


def _text(text: str, *, several: bool) -> Any:
    """The text itself; quotes that are there for YAML, null, and a list where the key takes several texts are read as such. A number
    or true, which is seldom meant, is refused later, and the refusal says how to mean it."""
    value = scalar(text)
    quoted = text[:1] in ("'", '"') and isinstance(value, str)
    nothing = value is None and text.strip() in ("null", "Null", "NULL", "~")
    as_yaml = quoted or nothing or isinstance(value, (bool, int, float)) or (several and isinstance(value, list))
    return cast(Any, value) if as_yaml else text


def build(data: Mapping[str, Any]) -> Config:
    """A validated Config. Raises ConfigError (or a section's own OpdError) saying what, why and what to do, before torch is imported."""
    settings = check(data)
    from opd.config.whole import whole_config  # torch comes with it

    return whole_config(settings)


def check(data: Mapping[str, Any]) -> RunSettings:
    """As `build`, without the objective that computes: torch is not imported."""
    return parse_section(RunSettings, data)


def without_idle_defaults(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A run's config.yaml without the defaults of settings that its objective does not read, which older versions wrote down."""
    objective = saved.get("objective")
    if not isinstance(objective, Mapping):
        return saved
    given = cast("Mapping[str, Any]", objective)
    idle = {
        name
        for name, (default, chooser, choices) in READ_BY.items()
        if given.get(name) == default and given.get(chooser) not in choices
    }
    return {**saved, "objective": {name: value for name, value in given.items() if name not in idle}}


def load(recipe: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """A recipe file with command-line overrides."""
    return build(words_of(recipe, overrides))


def words_of(recipe: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe file with command-line overrides, as nested mappings that nothing has checked yet."""
    return merge(read_recipe(recipe) if recipe else {}, parse_overrides(overrides))


def to_dict(config: RunSettings) -> dict[str, Any]:
    """Plain types only, as written to config.yaml."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in cast("Mapping[str, Any]", value).items()}
        return [plain(v) for v in cast("list[Any]", value)] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def to_yaml(config: RunSettings) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)

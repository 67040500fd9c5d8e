"""Recipe files and `--section.key value` overrides → a `Config`.

One route in: YAML and overrides are merged, unknown keys are refused with the nearest known name, types are checked by pydantic,
then each section's own rules run. Nothing here starts a model.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import yaml

from opd.config import Config
from opd.config.sections import all_keys, hint_of, parse_section
from opd.errors import ConfigError
from opd.losses.settings import READ_BY


class _Yaml(yaml.SafeLoader):
    """YAML 1.2's idea of a boolean, so that `progress: off` is a word and not False; a key given twice is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the name and the type are PyYAML's
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key: Any = cast(Any, self).construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(
                    f"'{key}' is there twice, again in line {line}, and only one of the two can be meant."
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


cast(Any, _Yaml).add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def whole_keys() -> list[str]:
    """Every key of a recipe."""
    return all_keys(Config)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """A recipe's YAML as a dict. Raises ConfigError when it is missing or malformed."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"No recipe at '{path}'. Give the path of a YAML file, e.g. recipes/demo/recipe.yaml."
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"The recipe '{path}' is a folder; give the YAML file in it.") from None
    except OSError as error:
        raise ConfigError(f"The recipe '{path}' cannot be read: {error.strerror}. Check its permissions.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"The recipe '{path}' is not text; a recipe is a YAML file in UTF-8.") from None
    try:
        data = yaml.load(text, _Yaml)
    except yaml.YAMLError as error:
        raise ConfigError(f"The recipe '{path}' is not valid YAML; mend the place it names. {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"The recipe '{path}' must be a mapping of sections, not a {type(data).__name__}; write e.g. 'train: {{steps: 50}}'."
        )
    return cast("dict[str, Any]", data)


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


def _scalar(text: str) -> Any:
    try:
        return yaml.load(text, _Yaml)
    except yaml.YAMLError:
        return text


def _reader(dotted: str) -> Callable[[str], Any]:
    """The reader of a key's words: YAML, or word for word where the key takes text alone. A path may hold what is a list, a comment
    or a date to YAML."""
    annotation = hint_of(Config, dotted)
    kinds = set(get_args(annotation)) or {annotation}
    if str not in kinds or not kinds <= {str, type(None), Ellipsis}:
        return _scalar
    return partial(_text, several=Ellipsis in kinds)


def _text(text: str, *, several: bool) -> Any:
    """The text itself; quotes that are there for YAML, null, and a list where the key takes several texts are read as such. A number
    or true, which is seldom meant, is refused later, and the refusal says how to mean it."""
    value = _scalar(text)
    quoted = text[:1] in ("'", '"') and isinstance(value, str)
    nothing = value is None and text.strip() in ("null", "Null", "NULL", "~")
    as_yaml = quoted or nothing or isinstance(value, (bool, int, float)) or (several and isinstance(value, list))
    return cast(Any, value) if as_yaml else text


def merge(recipe: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with dotted overrides put in; the recipe itself is not changed."""
    merged = {key: _own_copy(value) if isinstance(value, Mapping) else value for key, value in recipe.items()}
    for dotted, value in overrides.items():
        *sections, key = dotted.split(".")
        node: dict[str, Any] = merged
        for section in sections:
            node[section] = node = _own_copy(node.get(section))
        node[key] = value
    return merged


def _own_copy(value: Any) -> dict[str, Any]:
    return dict(cast("Mapping[str, Any]", value)) if isinstance(value, Mapping) else {}


def build(data: Mapping[str, Any]) -> Config:
    """A validated Config. Raises ConfigError (or a section's own OpdError) saying what, why and what to do."""
    return parse_section(Config, data)


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
    return build(merge(read_recipe(recipe) if recipe else {}, parse_overrides(overrides)))


def to_dict(config: Config) -> dict[str, Any]:
    """Plain types only, as written to config.yaml."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in cast("Mapping[str, Any]", value).items()}
        return [plain(v) for v in cast("list[Any]", value)] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)

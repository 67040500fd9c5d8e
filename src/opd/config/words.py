"""The words of a recipe: its YAML file, and `--section.key value` put into it. What they mean is decided by the sections, elsewhere."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, cast

import yaml

from opd.errors import ConfigError


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
            if not isinstance(key, Hashable):
                break  # PyYAML has an error for it
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


def scalar(text: str) -> Any:
    """A word of the command line as YAML reads it; text that is no YAML is itself."""
    try:
        return yaml.load(text, _Yaml)
    except yaml.YAMLError:
        return text


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

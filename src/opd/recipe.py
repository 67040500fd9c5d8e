"""Recipe files and `--section.key value` overrides → a `Config`.

One route in: YAML and overrides are merged, unknown keys are refused with the nearest known name, types are checked by pydantic,
then each section's own rules run. Nothing here starts a model.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from opd.config import Config
from opd.errors import ConfigError, ObjectiveError, OpdError, did_you_mean
from opd.losses import Objective


class _Yaml(yaml.SafeLoader):
    """YAML 1.2's idea of a boolean, so that `progress: off` is a word and not False; a key given twice is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the name and the type are PyYAML's
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(
                    f"'{key}' is there twice, again in line {line}, and only one of the two can be meant."
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Yaml.add_implicit_resolver(
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
    return data


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
            if value.lstrip("-").partition("=")[0] in _all_keys(Config):
                raise ConfigError(f"'{value}' after {name} looks like a key of its own; write --{value.lstrip('-')}.")
        parsed = [_scalar(value) for value in values]
        overrides[name[2:].replace("-", "_")] = parsed[0] if len(parsed) == 1 else parsed
    return overrides


FLAGS = ("--resume", "--overwrite", "--debug")
"""Words on the command line that take no value."""


def _scalar(text: str) -> Any:
    try:
        return yaml.load(text, _Yaml)
    except yaml.YAMLError:
        return text


def merge(recipe: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with dotted overrides put in; the recipe itself is not changed."""
    merged = {key: dict(value) if isinstance(value, Mapping) else value for key, value in recipe.items()}
    for dotted, value in overrides.items():
        *sections, key = dotted.split(".")
        node = merged
        for section in sections:
            child = node.get(section)
            node[section] = dict(child) if isinstance(child, Mapping) else {}
            node = node[section]
        node[key] = value
    return merged


def build(data: Mapping[str, Any]) -> Config:
    """A validated Config. Raises ConfigError (or a section's own OpdError) saying what, why and what to do."""
    _refuse_unknown_keys(Config, data, "")
    try:
        return TypeAdapter(Config).validate_python(_lists_to_tuples(Config, data))
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == ("objective", "tail") and first["input"] == "ignore":
            _refuse_ignored_tail()
        raise _explain(error) from None


def _refuse_ignored_tail() -> None:
    """Not a misspelling but a loss in wide use: the objective itself says why it has none of it."""
    try:
        Objective(support="teacher_top_k", tail="ignore")  # pyright: ignore[reportArgumentType]
    except ObjectiveError as error:
        raise ObjectiveError(f"objective: {error}") from None


def load(recipe: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """A recipe file with command-line overrides."""
    return build(merge(read_recipe(recipe) if recipe else {}, parse_overrides(overrides)))


def to_dict(config: Config) -> dict[str, Any]:
    """Plain types only, as written to config.yaml."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def _sections_by_name(annotation: Any) -> type | None:
    """The dataclass in `dict[str, Section]`."""
    if get_origin(annotation) is not dict:
        return None
    section = get_args(annotation)[1]
    return section if dataclasses.is_dataclass(section) and isinstance(section, type) else None


def _section_of(annotation: Any) -> type | None:
    """The dataclass in `Section` or `Section | None`."""
    if get_origin(annotation) is dict:
        return None
    candidates = get_args(annotation) if get_origin(annotation) is not None else (annotation,)
    return next((c for c in candidates if dataclasses.is_dataclass(c) and isinstance(c, type)), None)


def _refuse_unknown_keys(section: type, data: Any, prefix: str) -> None:
    if not isinstance(data, Mapping):
        return  # the type check says what is wrong
    hints = get_type_hints(section)
    names = [f.name for f in dataclasses.fields(section)]
    for key, value in data.items():
        if key not in names:
            raise ConfigError(_unknown(f"{prefix}{key}", str(key), names, prefix))
        child, named = _section_of(hints[key]), _sections_by_name(hints[key])
        if named is not None and isinstance(value, Mapping):
            for name, section_of_it in value.items():
                if not isinstance(section_of_it, (Mapping, named)):
                    example = f"{prefix}{key}.{name}.{dataclasses.fields(named)[0].name}"
                    raise ConfigError(
                        f"'{prefix}{key}.{name}' is a section and cannot be {section_of_it!r}; set its keys, e.g. --{example} VALUE."
                    )
                _refuse_unknown_keys(named, section_of_it, f"{prefix}{key}.{name}.")
        elif child is not None:
            optional = child is not hints[key]
            if not isinstance(value, (Mapping, child)) and not (optional and value is None):
                what = "is empty" if value is None else f"cannot be {value!r}"
                example = f"{prefix}{key}.{dataclasses.fields(child)[0].name}"
                raise ConfigError(f"'{prefix}{key}' is a section and {what}; set its keys, e.g. --{example} VALUE.")
            _refuse_unknown_keys(child, value, f"{prefix}{key}.")
        elif isinstance(value, bool) and {int, float} & {hints[key], *get_args(hints[key])}:
            raise ConfigError(f"'{prefix}{key}' cannot be {str(value).lower()}: it is a number; write one.")


def _all_keys(section: type, prefix: str = "") -> list[str]:
    hints = get_type_hints(section)
    keys = []
    for item in dataclasses.fields(section):
        child, named = _section_of(hints[item.name]), _sections_by_name(hints[item.name])
        if named is not None:
            keys += _all_keys(named, f"{prefix}{item.name}.NAME.")
        else:
            keys += _all_keys(child, f"{prefix}{item.name}.") if child else [f"{prefix}{item.name}"]
    return keys


def _unknown(dotted: str, key: str, names: Sequence[str], prefix: str) -> str:
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    suggestion = f"{prefix}{near[0]}" if near else None
    if suggestion is None:  # right name, wrong section?
        elsewhere = [k for k in _all_keys(Config) if k.rsplit(".", 1)[-1] == key]
        near_all = elsewhere or difflib.get_close_matches(dotted, _all_keys(Config), n=1, cutoff=0.6)
        suggestion = near_all[0] if near_all else None
    hint = f" Did you mean '{suggestion}'?" if suggestion else ""
    where = f"section '{prefix[:-1]}'" if prefix else "a recipe"
    return f"Unknown key '{dotted}'.{hint} Keys of {where}: {', '.join(names)}."


def _lists_to_tuples(section: type, data: Any) -> Any:
    """A single value where the field is a tuple becomes a tuple of one: `--rollout.stop END` is `stop: [END]`."""
    if not isinstance(data, Mapping):
        return data
    hints = get_type_hints(section)
    out: dict[str, Any] = {}
    for key, value in data.items():
        child, named = _section_of(hints[key]), _sections_by_name(hints[key])
        if child is not None:
            out[key] = _lists_to_tuples(child, value)
        elif named is not None and isinstance(value, Mapping):
            out[key] = {name: _lists_to_tuples(named, section_of_it) for name, section_of_it in value.items()}
        elif get_origin(hints[key]) is tuple and not isinstance(value, (list, tuple)) and value is not None:
            out[key] = (value,)
        else:
            out[key] = value
    return out


def _explain(error: ValidationError) -> OpdError:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, OpdError):
        return type(cause)(f"objective: {cause}") if isinstance(cause, ObjectiveError) else cause
    dotted = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        if isinstance(first["loc"][-1], int):  # a tuple of fixed length
            whole = ".".join(map(str, first["loc"][:-1]))
            return ConfigError(
                f"'{whole}' has too few values, {first['input']!r}; the default shows how many it takes."
            )
        section = _section_of(get_type_hints(Config).get(dotted))
        key = f"{dotted}.{dataclasses.fields(section)[0].name}" if section else dotted
        return ConfigError(f"'{dotted}' is not set, and has no default. Add it to the recipe or pass --{key} VALUE.")
    more = f" ({error.error_count() - 1} more after it)" if error.error_count() > 1 else ""
    hint = ""
    if first["type"] == "literal_error":
        hint = did_you_mean(str(first["input"]), re.findall(r"'([^']*)'", first["msg"]))
    elif first["type"] == "string_type":
        hint = " Put it in quotes if it is meant as text."
    problem = first["msg"][0].lower() + first["msg"][1:]
    return ConfigError(f"'{dotted}' cannot be {first['input']!r}: {problem}{more}.{hint}")

"""A run's config.yaml for a reader: every line, and which keys differ from the defaults.

The sections of a recipe import torch, by way of the objective; they are imported when a configuration is read, and not before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import yaml

from opd.errors import OpdError

NO_DEFAULT = "none"
PRESENT = "present"
"""Shown for a section that is not there by default, such as student.lora."""
ALWAYS = ("teacher",)
"""Sections without a default that nearly every recipe has."""
PLACES = ("run_dir", "train.tokens_per_microbatch")
"""Keys that say where a run is kept, or what its machine has room for, and nothing of what it computes."""


@dataclass(frozen=True, kw_only=True)
class ChangedKey:
    """A key whose value is not its default."""

    key: str
    value: str
    default: str
    """Empty for a key that has none."""


@dataclass(frozen=True, kw_only=True)
class ConfigLine:
    text: str
    changed: bool


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """The lines of config.yaml, and its keys that differ from the defaults."""

    lines: tuple[ConfigLine, ...]
    changed: tuple[ChangedKey, ...]


def configuration(text: str, content: Mapping[str, Any] | None = None) -> Configuration:
    """Of a config.yaml, whose content may be given; of one that this version cannot read, the lines alone."""
    changed = changed_keys(parsed(text) if content is None else content)
    names = {found.key for found in changed}
    lines = tuple(ConfigLine(text=line, changed=key in names) for key, line in _keyed_lines(text))
    return Configuration(lines=lines, changed=tuple(changed))


def parsed(text: str) -> Mapping[str, Any]:
    """The content; empty for text that is no mapping."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where libyaml is
    try:
        found = yaml.load(text, loader)  # either is a safe loader
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, Mapping) else {}


def changed_keys(saved: Mapping[str, Any]) -> list[ChangedKey]:
    """Keys whose value is not the one that the run would have had without them."""
    changed: list[ChangedKey] = []
    for key, value in _leaves(saved):
        default = _default(key)
        if key in (*PLACES, *ALWAYS) or (default is not MISSING and _plain(default) == value):
            continue
        if default is None and value is not PRESENT and (default := _filled_in(saved, key)) == value:
            continue
        shown = "" if default is MISSING else _shown(_plain(default))
        changed.append(ChangedKey(key=key, value=_shown(value), default=shown))
    return changed


def _leaves(saved: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in saved.items():
        key = f"{at}{name}"
        if isinstance(value, Mapping) and value and _is_section(key):
            if _default(key) is None:
                yield key, PRESENT
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _is_section(key: str) -> bool:
    """True for a section, a dict of sections, and one of the sections in it."""
    from opd.config import Config
    from opd.config.sections import hint_of, section_of

    hint = hint_of(Config, key)
    return section_of(hint) is not None or "Config" in str(hint)


def _default(key: str) -> Any:
    """The default of a key in its dataclass; MISSING where there is none."""
    from opd.config import Config
    from opd.config.sections import hint_of, section_of

    at, _, name = key.rpartition(".")
    section = section_of(hint_of(Config, at)) if at else Config
    found = next((item for item in fields(section) if item.name == name), None) if section is not None else None
    if found is None:
        return MISSING
    return found.default_factory() if found.default_factory is not MISSING else found.default


def _filled_in(saved: Mapping[str, Any], key: str) -> Any:
    """The value that a key with the default None takes from the others."""
    from opd.config.recipe import build, merge, to_dict

    try:
        filled = to_dict(build(merge(saved, {key: None})))
    except OpdError:
        return None
    for part in key.split("."):
        filled = filled[part] if isinstance(filled, Mapping) else None
    return filled


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    if value is None:
        return NO_DEFAULT
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).strip().removesuffix("\n...")


def _keyed_lines(text: str) -> Iterator[tuple[str, str]]:
    """Every line with its dotted key; a line of a list has the key that the list belongs to."""
    path: list[tuple[int, str]] = []
    for line in text.splitlines():
        if found := re.match(r"( *)([^\s:#-][^:]*):(?: |$)", line):
            indent = len(found[1])
            path = [(depth, name) for depth, name in path if depth < indent] + [(indent, found[2])]
        yield ".".join(name for _, name in path), line

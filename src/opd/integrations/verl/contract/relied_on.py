"""Every place in verl that this plugin relies on, read from `relied_on.yaml`. Needs no verl.

`source_check` looks the places up in verl's source, so that a release that moves one can be refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

import yaml


@dataclass(frozen=True, kw_only=True)
class ReliedOn:
    """One class, function or table of verl, or one section of its config."""

    where: str
    """`module:Dotted.name`, `module:` for the whole module, or `path/in/verl.yaml:dotted.section`."""
    needs: str = ""
    """Parameters of a function; methods, fields, attributes and constructor parameters of a class; keys of a section."""
    says: str = ""
    """Names, strings and `keyword=`s that stand in it: what it reads, sets or calls, where no signature shows that."""
    abstract: str | None = None
    """All methods that a subclass has to define, where ours is one: one more would make ours unusable."""
    why: str
    since: tuple[int, ...] = (0, 8, 0)
    """The first release that has it. `plugin.v080` serves verl 0.8 without."""


def _read() -> Mapping[str, tuple[ReliedOn, ...]]:
    text = files("opd.integrations.verl.contract").joinpath("relied_on.yaml").read_text(encoding="utf-8")

    def made(since: str = "0.8.0", **entry: str) -> ReliedOn:
        return ReliedOn(since=tuple(map(int, since.split("."))), **entry)

    return {part: tuple(made(**entry) for entry in entries) for part, entries in yaml.safe_load(text).items()}


BY_PART = _read()
"""The places that each part of the plugin relies on."""
HOOKS = tuple(hook for part in BY_PART.values() for hook in part)

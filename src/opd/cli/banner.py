"""The banner of `opd train`, from the words of the recipe: torch, which takes seconds to import, is not there yet."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, cast

from opd import __version__
from opd.config.model import StudentConfig
from opd.config.prompts import PromptsConfig
from opd.config.rollout import RolloutConfig
from opd.config.train import EvalConfig, LogConfig, TrainConfig
from opd.config.words import merge, read_recipe, scalar
from opd.errors import OpdError

SECTIONS = {
    "student": StudentConfig,
    "prompts": PromptsConfig,
    "rollout": RolloutConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "log": LogConfig,
}
WORDS = ("model", "path", "eval_path", "run_dir", "revision", "progress")
"""Keys whose value is taken word for word."""
RUN_DIR = "runs/opd"


def show_banner(recipe: str | None, overrides: Sequence[str]) -> bool:
    """Print the banner; False, and nothing printed, for a recipe that is wrong, which reading it in full will explain."""
    try:
        settings = settings_of(recipe, overrides)
        if settings["log"]["progress"] == "off":
            return False
        from opd.reporting.banner import banner, show

        lines = banner(settings, __version__)
    except (OpdError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return False
    show(lines, sys.stdout)
    return True


def settings_of(recipe: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    """The recipe as nested mappings, with the defaults of the sections that need no torch. Raises KeyError for a key that these lack;
    nothing else is checked."""
    words = merge(read_recipe(recipe) if recipe else {}, _overrides(overrides))
    for name, section in SECTIONS.items():
        unknown = set(words.get(name) or {}) - {item.name for item in fields(cast(Any, section))}
        if unknown:
            raise KeyError(*unknown)
    filled = {name: {**_defaults(section), **(words.get(name) or {})} for name, section in SECTIONS.items()}
    return {"run_dir": RUN_DIR, **words, **filled}


def _overrides(words: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    index = 0
    while index < len(words):
        name, equals, value = words[index].partition("=")
        index += 1
        values = [value] if equals else []
        while not equals and index < len(words) and not words[index].startswith("--"):
            values.append(words[index])
            index += 1
        key = name[2:].replace("-", "_")
        read = [value if key.rpartition(".")[2] in WORDS else scalar(value) for value in values]
        found[key] = read[0] if len(read) == 1 else read
    return found


def _defaults(section: type) -> Mapping[str, Any]:
    return {
        item.name: item.default_factory() if item.default_factory is not MISSING else item.default
        for item in fields(cast(Any, section))
        if item.default is not MISSING or item.default_factory is not MISSING
    }

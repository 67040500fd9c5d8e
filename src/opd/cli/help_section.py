"""`opd train --help SECTION`: the keys of one section, as the whole help shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, make_dataclass
from typing import Any

from opd.config import LoraConfig, PromptsConfig, RunSettings, StudentConfig, TeacherConfig
from opd.config.sections import hint_of, section_of, sections_by_name
from opd.errors import ConfigError, did_you_mean

HELP_WORDS = ("-h", "--help")


def asked_for(args: Sequence[str]) -> str | None:
    """The section after --help; None where the whole help is asked for."""
    place = next(i for i, word in enumerate(args) if word in HELP_WORDS)
    after = list(args[place + 1 :])
    return after[0].removeprefix("--").replace("-", "_") if after and after[0] not in HELP_WORDS else None


def shown_settings() -> RunSettings:
    """A recipe with every section there, and with what it must name shown as required."""
    import tyro

    shown = RunSettings(
        student=StudentConfig(model="-", lora=LoraConfig()),
        teacher=TeacherConfig(model="-"),
        teachers={},
        prompts=PromptsConfig(path="-"),
    )
    for section, key in ((shown.student, "model"), (shown.teacher, "model"), (shown.prompts, "path")):
        object.__setattr__(section, key, tyro.MISSING)
    return shown


def narrowed(name: str) -> tuple[Any, Any]:
    """A dataclass of one section or subsection, under the names of its keys in a recipe, and its defaults. Raises ConfigError for a name
    that is no section."""
    name = name.removesuffix(".")
    if name.startswith("teachers"):
        name = "teacher"
    places = section_names()
    if name not in places:
        section = name.rpartition(".")[0]
        if section in places and hint_of(RunSettings, name) is not None:
            raise ConfigError(f"'{name}' is a key of the section {section}; see opd train --help {section}.")
        hint = did_you_mean(name, places) or _of_key(name, places)
        raise ConfigError(f"A recipe has no section '{name}'.{hint} Sections: {', '.join(places)}.")
    value: Any = shown_settings()
    for part in name.split("."):
        value = getattr(value, part)
    kind, default = type(value), value
    for part in reversed(name.split(".")):
        kind = make_dataclass("Section", [(part, kind)])
        default = kind(**{part: default})
    return kind, default


def section_names() -> list[str]:
    """Dotted names of sections and subsections, in the order of a recipe; `teachers` are like `teacher`, and left out."""
    return _names(RunSettings, "")


def _names(section: type, prefix: str) -> list[str]:
    found: list[str] = []
    for item in fields(section):  # pyright: ignore[reportArgumentType]  # of a dataclass
        hint = hint_of(section, item.name)
        child = None if sections_by_name(hint) is not None else section_of(hint)
        if child is not None:
            found += [f"{prefix}{item.name}", *_names(child, f"{prefix}{item.name}.")]
    return found


def _of_key(name: str, places: Sequence[str]) -> str:
    """The sections that have a key of this name."""
    having = [place for place in places if hint_of(RunSettings, f"{place}.{name}") is not None]
    return f" '{name}' is a key of {', '.join(having)}." if having else ""

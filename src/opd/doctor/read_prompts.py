"""The prompts of a recipe, and what their files hold that no prompt does. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from opd.config.run import RunSettings
from opd.data.prompts import load_prompts, unread_columns
from opd.types import Prompt


@dataclass(frozen=True, kw_only=True)
class ReadPrompts:
    """All rows that a run takes."""

    training: list[Prompt]
    held_out: list[Prompt]
    """Empty where eval.every is 0, and without held-out prompts."""
    said: tuple[str, ...]
    """Sentences about what rows hold and prompts do not."""
    noted: tuple[str, ...]
    """Sentences about what is read from elsewhere, which need no action."""


def read_prompts(
    settings: RunSettings, rows: Iterable[Any] | None = None, held_out_rows: Iterable[Any] | None = None
) -> ReadPrompts:
    """Read the files that the recipe names; rows that are given are read in their place. Raises DataError, and ConfigError for a template
    or a limit that cannot be."""
    section, said, noted = settings.prompts, list[str](), list[str]()
    tell: dict[str, Any] = {"say": said.append, "note": noted.append}
    training = load_prompts(section.path, rows=rows, **section.training(), **tell)
    said += unread_columns(training, section.path, section.templates)
    held_out: list[Prompt] = []
    if settings.eval.every > 0 and section.eval_path is not None:
        options = section.held_out(settings.eval.prompts)
        held_out = load_prompts(section.eval_path, rows=held_out_rows, **options, **tell)
    once = (tuple(dict.fromkeys(said)), tuple(dict.fromkeys(noted)))
    return ReadPrompts(training=training, held_out=held_out, said=once[0], noted=once[1])

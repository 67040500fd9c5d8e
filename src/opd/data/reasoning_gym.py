"""Tasks of the package reasoning-gym as rows: `reasoning_gym:NAME` in the place of a file of prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from opd.errors import DataError, MissingDependencyError

PREFIX = "reasoning_gym:"
COLUMN = "reasoning_gym"
"""Column of a row that its reward reads: the task's name, its settings, and the entry that the package made."""
OWN_SETTINGS = ("size", "seed")


def task_rows(
    path: str, *, size: int = 1000, seed: int = 0, config: Mapping[str, Any] | None = None, chat: bool = True
) -> Iterator[dict[str, Any]]:
    """`size` rows of a task: a question (one message of the user, or text without `chat`), its answer, and what its verifier needs.

    `config` are settings of the task. Raises MissingDependencyError at once, DataError for a task or a setting that is not there.
    """
    if find_spec("reasoning_gym") is None:
        raise MissingDependencyError(
            f"reading {path} needs the package reasoning-gym, which is not installed; pip install 'opd[reasoning-gym]'."
        )
    return _rows(path.removeprefix(PREFIX), {**(config or {}), "size": size, "seed": seed}, chat)


def make_task(name: str, settings: Mapping[str, Any]) -> Any:
    """The package's data set of that name. Raises DataError."""
    tasks: Mapping[str, Any] = import_module("reasoning_gym.factory").DATASETS
    if name not in tasks:
        near = get_close_matches(name, list(tasks), n=1)
        hint = f"Did you mean {PREFIX}{near[0]}?" if near else f"It has {', '.join(sorted(tasks))}."
        raise DataError(f"reasoning-gym has no task {name!r}. {hint}")
    kind, settings_of = tasks[name]
    known = [field.name for field in dataclasses.fields(settings_of)]
    unknown = next((key for key in settings if key not in known), None)
    if unknown is not None:
        free = sorted(key for key in known if key not in OWN_SETTINGS)
        raise DataError(
            f"reasoning-gym's task {name!r} has no setting {unknown!r}; it has {', '.join(free) or 'none'}."
        )
    try:
        return kind(settings_of(**settings))  # which validates them
    except (AssertionError, TypeError, ValueError) as error:
        raise DataError(
            f"reasoning-gym's task {name!r} refuses its settings ({str(error) or type(error).__name__}); correct "
            "prompts.reasoning_gym.config."
        ) from error


def _rows(name: str, settings: dict[str, Any], chat: bool) -> Iterator[dict[str, Any]]:
    task = make_task(name, settings)
    for index in range(settings["size"]):
        entry = task[index]
        question = entry["question"]
        yield {
            "prompt": [{"role": "user", "content": question}] if chat else question,
            "answer": entry["answer"],
            COLUMN: {"name": name, "settings": settings, "entry": entry},
        }

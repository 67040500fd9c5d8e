"""Defaults of a recipe's keys, read from the source of its sections: to import them takes torch, and seconds."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import opd

FILES = ("config/*.py", "losses/settings.py")
PLACES = {
    "Config": ("",),
    "ObjectiveSettings": ("objective.",),
    "ModelConfig": ("student.", "teacher."),
    "LoadOptionsConfig": ("student.load_options.", "teacher.load_options."),
}
"""Sections whose source does not say where they are in a recipe; of others it is `class …(Section, key=PLACE)`."""


def recipe_defaults() -> dict[str, object]:
    """Dotted key → default, of the keys whose default is written as a plain value. Those of `teachers.NAME` are those of `teacher`."""
    found: dict[str, object] = {}
    for path in (path for pattern in FILES for path in sorted(Path(opd.__file__).parent.glob(pattern))):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found |= {place + name: value for place in _places(node) for name, value in _values(node)}
    return found


def _places(node: ast.ClassDef) -> tuple[str, ...]:
    keys = [word.value.value for word in node.keywords if word.arg == "key" and isinstance(word.value, ast.Constant)]
    return PLACES.get(node.name) or tuple(f"{key}." for key in keys)


def _values(node: ast.ClassDef) -> Iterator[tuple[str, object]]:
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value is not None:
            try:
                value = ast.literal_eval(line.value)
            except ValueError:  # a factory, or a name
                continue
            yield line.target.id, list(value) if isinstance(value, tuple) else value

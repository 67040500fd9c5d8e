"""Defaults of a recipe's keys, read from the source of its sections: to import them takes torch, and seconds."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import opd

FILES = ("config/*.py", "losses/settings.py")
DROPPING = ("guard.truncated.", "guard.repetition.")
WATCHING = tuple(
    f"guard.{rule}."
    for rule in ("length", "eos_prob", "entropy", "loss", "reward", "clipped", "sampler_gap", "canary", "start_kl")
)
PLACES = {
    "RunSettings": ("",),
    "ObjectiveSettings": ("objective.",),
    "ModelConfig": ("student.", "teacher."),
    "LoadOptionsConfig": ("student.load_options.", "teacher.load_options."),
    "GuardRule": (*DROPPING, *WATCHING),
    "DropRule": DROPPING,
    "WatchRule": WATCHING,
}
"""Sections whose source does not say where they are in a recipe; of others it is `class …(Section, key=PLACE)`."""


def recipe_defaults() -> dict[str, object]:
    """Dotted key → default, of the keys whose default is written as a plain value. Those of `teachers.NAME` are those of `teacher`."""
    found: dict[str, object] = {}
    for path in (path for pattern in FILES for path in sorted(Path(opd.__file__).parent.glob(pattern))):
        body = ast.parse(path.read_text("utf-8")).body
        constants = dict(_values(body, {}))
        for node in body:
            if isinstance(node, ast.ClassDef):
                values = dict(_values(node.body, constants))
                found |= {place + name: value for place in _places(node) for name, value in values.items()}
    return found


def _places(node: ast.ClassDef) -> tuple[str, ...]:
    keys = [word.value.value for word in node.keywords if word.arg == "key" and isinstance(word.value, ast.Constant)]
    return PLACES.get(node.name) or tuple(f"{key}." for key in keys)


def _values(body: Iterable[ast.stmt], constants: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Names that are given a plain value, or one of the constants."""
    for line in body:
        target = (
            line.target
            if isinstance(line, ast.AnnAssign)
            else line.targets[0]
            if isinstance(line, ast.Assign)
            else None
        )
        value = line.value if isinstance(line, (ast.AnnAssign, ast.Assign)) else None
        if not isinstance(target, ast.Name) or value is None:
            continue
        if isinstance(value, ast.Name) and value.id in constants:
            yield target.id, constants[value.id]
            continue
        try:
            plain = ast.literal_eval(value)
        except ValueError:  # a factory, or an expression
            continue
        yield target.id, list(plain) if isinstance(plain, tuple) else plain

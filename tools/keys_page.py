"""The page of every recipe key, with type, default and meaning, from the source of the sections. `make docs` puts it into the site."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Any, get_args, get_origin

from opd.config.run import RunSettings
from opd.config.sections import hint_of, section_of, sections_by_name

REQUIRED = "required"
HEAD = """# Every key of a recipe

`opd train --help` prints the same list. A key is written in the recipe, as `train: {steps: 200}`, or on the command line, as
`--train.steps 200`; the command line wins. A misspelt key is refused with the nearest name.
"""


def documented(section: type) -> dict[str, str]:
    """The sentence below each field, by name; a base class's where the section has none of its own."""
    found: dict[str, str] = {}
    for owner in reversed(section.__mro__):
        if owner is object:
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef), owner
        for line, after in zip(body.body, body.body[1:], strict=False):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and _is_text(after):
                found[line.target.id] = " ".join(ast.literal_eval(after.value).split())  # type: ignore[attr-defined]
    return found


def _is_text(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)


def spelled(hint: Any) -> str:
    """A type as a reader of YAML would say it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is not None and getattr(origin, "__name__", "") == "Literal":
        return ", ".join(f"`{value}`" for value in inner)
    if inner and type(None) in inner:
        return f"{' or '.join(spelled(one) for one in inner if one is not type(None))} or null"
    if origin in (tuple, list):
        return f"list of {spelled(inner[0])}"
    if origin is dict:
        return "mapping"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
        getattr(hint, "__name__", ""), "value"
    )


def default_of(item: Field[Any]) -> str:
    """The default as YAML; "required" where there is none."""
    value = item.default
    if value is MISSING and item.default_factory is not MISSING:
        value = item.default_factory()
    if value is MISSING:
        return REQUIRED
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, dict):
        return "{}"
    return str(value) if value != "" else "empty"


def sections(section: type, place: str) -> Iterator[tuple[str, type]]:
    """Every section with its dotted place, depth first."""
    yield place, section
    for item in fields(section):
        hint = hint_of(section, item.name)
        child = section_of(hint) or sections_by_name(hint)
        if child is not None and not (place == "" and item.name == "teachers"):
            yield from sections(child, f"{place}.{item.name}".lstrip("."))


def lines_of(place: str, section: type) -> Iterator[str]:
    """The lines of one section."""
    said = documented(section)
    keys = [item for item in fields(section) if section_of(hint_of(section, item.name)) is None]
    keys = [item for item in keys if sections_by_name(hint_of(section, item.name)) is None]
    yield f"\n## {place or 'The run itself'}\n"
    if place:
        yield f"{' '.join((inspect.getdoc(section) or '').split())}\n"
    if place == "teacher":
        yield "Several teachers stand by name under `teachers`, each with these keys: `teachers: {math: {model: PATH}}`.\n"
    for item in keys:
        key = f"{place}.{item.name}".lstrip(".")
        hint = spelled(hint_of(section, item.name))
        default = default_of(item)
        default = default if default == REQUIRED else f"default {default}"
        yield f"`{key}` — {hint}; {default}\n: {escaped(said.get(item.name, ''))}\n"


def escaped(text: str) -> str:
    """The text with what Markdown would read as marks written out."""
    for mark in "\\*_[]{}<>$|":
        text = text.replace(mark, f"\\{mark}")
    return text


def page() -> str:
    """The whole page."""
    found = [line for place, section in sections(RunSettings, "") for line in lines_of(place, section)]
    return HEAD + "\n".join(found) + "\n"

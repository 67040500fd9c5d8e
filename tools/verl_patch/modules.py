"""The modules of this repository as lists of statements, so that some of them can be copied."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import opd

ROOTS = {"opd": Path(opd.__file__).parent, "tools": Path(__file__).parents[1]}
IMPORTS = (ast.Import, ast.ImportFrom)


@dataclass(frozen=True, eq=False)
class Statement:
    """One statement at the top of a module or of a class, with the comments above it and the docstring below."""

    node: ast.stmt
    first: int
    last: int
    """Lines of the file, from 1, both included."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names that it binds."""
        return tuple(_bound(self.node))

    @property
    def defines(self) -> bool:
        """It is a function or a class."""
        return isinstance(self.node, (ast.FunctionDef, ast.ClassDef))


@dataclass(frozen=True, eq=False)
class Module:
    """A file of ours."""

    name: str
    lines: tuple[str, ...]
    statements: tuple[Statement, ...]
    """Without the docstring and the import of __future__."""
    head: int
    """Lines before the first of these, but for blank ones."""

    @cached_property
    def binding(self) -> dict[str, Statement]:
        """Name → the statement that binds it."""
        return {name: statement for statement in self.statements for name in statement.names}

    def imported(self, name: str) -> tuple[str, str] | None:
        """The module and the name there that an import of ours binds `name` to; None where it is bound otherwise."""
        node = self.binding[name].node
        if not isinstance(node, (ast.ImportFrom, ast.If)):  # a lazy package imports its names for type checkers alone
            return None
        for part in ast.walk(node):
            if isinstance(part, ast.ImportFrom) and part.module is not None and find(part.module) is not None:
                found = next((alias.name for alias in part.names if (alias.asname or alias.name) == name), None)
                if found is not None:
                    return part.module, found
        return None

    def text_of(self, statement: Statement, without: set[ast.stmt]) -> list[str]:
        """The statement's lines; of a class, without these methods."""
        lines = dict(enumerate(self.lines[statement.first - 1 : statement.last], start=statement.first))
        if without:
            assert isinstance(statement.node, ast.ClassDef)
            for part in statements_of(statement.node.body, self.lines):
                if part.node in without:
                    first = part.first
                    while not self.lines[first - 2].strip():
                        first -= 1
                    for number in range(first, part.last + 1):
                        del lines[number]
        return list(lines.values())


@cache
def find(name: str) -> Module | None:
    """The module of this name; None where there is none of ours."""
    root, *rest = name.split(".")
    if root not in ROOTS:
        return None
    where = ROOTS[root].joinpath(*rest)
    path = next((p for p in (where.with_suffix(".py"), where / "__init__.py") if p.is_file()), None)
    if path is None:
        return None
    text = path.read_text(encoding="utf-8")
    lines = tuple(text.splitlines())
    every = list(statements_of(ast.parse(text).body, lines))
    head = [s for s in every[:2] if _is_text(s.node) or (isinstance(s.node, ast.ImportFrom) and s.node.module == "__future__")]  # fmt: skip
    return Module(name, lines, tuple(every[len(head) :]), max((s.last for s in head), default=0))


def module_of(name: str) -> Module:
    """The module of this name, which is one of ours."""
    found = find(name)
    assert found is not None, f"{name} is imported but is no module"
    return found


def statements_of(body: list[ast.stmt], lines: tuple[str, ...]) -> Iterator[Statement]:
    """The statements of a body; a bare string after an assignment is its docstring."""
    groups: list[list[ast.stmt]] = []
    for node in body:
        if groups and _is_text(node) and isinstance(groups[-1][-1], (ast.Assign, ast.AnnAssign)):
            groups[-1].append(node)
        else:
            groups.append([node])
    for group in groups:
        first = min(part.lineno for part in (group[0], *getattr(group[0], "decorator_list", ())))
        while first > 1 and lines[first - 2].lstrip().startswith("#"):
            first -= 1
        yield Statement(group[0], first, group[-1].end_lineno or first)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _bound(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, IMPORTS):
        yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)
    elif isinstance(node, (ast.If, ast.Try)):
        for inner in (*node.body, *node.orelse):
            yield from _bound(inner)
    else:
        yield from (n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))

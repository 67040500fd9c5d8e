"""The places in verl that the plugin relies on (`relied_on.yaml`), looked up in the source of a copy of verl.

Nothing of verl is imported, so any release can be checked in any environment, and one that moves a place can be refused by its name.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from opd.errors import ConfigError


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
    """The first release that has it. `plugin.base_engines` serves verl 0.8 without."""


def _read() -> Mapping[str, tuple[ReliedOn, ...]]:
    text = files("opd.integrations.verl.contract").joinpath("relied_on.yaml").read_text(encoding="utf-8")

    def made(since: str = "0.8.0", **entry: str) -> ReliedOn:
        return ReliedOn(since=tuple(map(int, since.split("."))), **entry)

    return {part: tuple(made(**entry) for entry in entries) for part, entries in yaml.safe_load(text).items()}


BY_PART = _read()
"""The places that each part of the plugin relies on."""
HOOKS = tuple(hook for part in BY_PART.values() for hook in part)


PARTS = ("config", "engine", "teacher")
"""The parts that every run of the plugin needs; teachers in verl's servers need `serving` and `pool`, and a CPU `cpu`."""
TESTED = ("0.8.0", "0.9.0", "0.9.1")
"""Releases of verl that the plugin was run with."""
OLDEST = (0, 8, 0)
NAMED = 3
"""Of hooks that moved, at most, in one error."""


@dataclass(frozen=True, kw_only=True)
class Moved:
    """A hook that is not where it was."""

    hook: ReliedOn
    how: str

    def __str__(self) -> str:
        return f"{self.hook.where} {self.how} ({self.hook.why})"


def installed() -> Path:
    """The folder of the verl that `import verl` would take. Raises ConfigError where there is none."""
    spec = importlib.util.find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("verl is not installed here; pip install 'opd[verl]'.")
    return Path(next(iter(spec.submodule_search_locations)))


def version_of(folder: Path) -> str:
    """The release, as verl itself reads it."""
    return (folder / "version/version").read_text(encoding="utf-8").strip()


def moved(folder: Path, hooks: Iterable[ReliedOn] = HOOKS) -> list[Moved]:
    """The `hooks` that the verl in this folder does not have, or has in another form."""
    source = VerlSource(folder)
    return [Moved(hook=hook, how=how) for hook in hooks if (how := source.lacks(hook)) is not None]


def check_contract(folder: Path, parts: Iterable[str] = PARTS, *, anyway: bool = False) -> str:
    """A line for the log about the verl in this folder; empty for a release that was tested and is as it was.

    Its source decides, not its number. Raises ConfigError where a hook of `parts` has moved, unless `anyway`.
    """
    version = version_of(folder)
    hooks = expected(version, [hook for part in parts for hook in BY_PART[part]])
    gone = moved(folder, hooks)
    if gone:
        told = "; ".join(map(str, gone[:NAMED])) + (f"; and {len(gone) - NAMED} more" if len(gone) > NAMED else "")
        what = f"verl {version} differs at {len(gone)} of {len(hooks)} places that this run holds on to: {told}"
        if not anyway:
            raise ConfigError(
                f"{what}. Use a release that opd was tested with (pip install 'verl=={TESTED[-1]}'), or set opd.try_verl=true to start all "
                "the same."
            )
        return f"warning: {what}. opd.try_verl=true: it starts all the same."
    if version in TESTED:
        return ""
    return (
        f"verl {version} is none of the releases that opd was tested with ({', '.join(TESTED)}), but all {len(hooks)} places that this run "
        "holds on to are where they were."
    )


def expected(version: str, hooks: Iterable[ReliedOn] = HOOKS) -> tuple[ReliedOn, ...]:
    """Those that a release should have; the others came after it. A release without a number (a fork) should have all.

    Of a release before 0.8 the hooks of 0.8 are expected.
    """
    numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    release = max(OLDEST, tuple(int(part or 0) for part in numbers.groups())) if numbers else None
    return tuple(hook for hook in hooks if release is None or hook.since <= release)


class VerlSource:
    """verl's files, parsed once each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.module = functools.cache(self._module)
        self.section = functools.cache(self._section)

    def lacks(self, hook: ReliedOn) -> str | None:
        """The difference at a hook; None where there is none."""
        where, _, name = hook.where.partition(":")
        if where.endswith(".yaml"):
            return self._lacks_keys(where, name, hook)
        module = self.module(where)
        if module is None:
            return "is gone: there is no such module"
        found = self.find(where, name) if name else (where, module)
        if found is None:
            return "is gone"
        return next(self._differences(*found, hook), None)

    def _differences(self, module: str, node: ast.AST, hook: ReliedOn) -> Iterator[str]:
        names = set(self.members(module, node)) if isinstance(node, ast.ClassDef) else _parameters(node)
        if missing := [name for name in hook.needs.split() if name not in names]:
            yield f"has no {', '.join(missing)}"
        if hook.says:
            said = _said(node)
            if missing := [word for word in hook.says.split() if word not in said]:
                yield f"says nothing of {', '.join(missing)} any more"
        if hook.abstract is not None and isinstance(node, ast.ClassDef):
            asked = {
                name
                for name, member in self.members(module, node).items()
                if any("abstract" in ast.unparse(decorator) for decorator in getattr(member, "decorator_list", []))
            }
            if more := sorted(asked - set(hook.abstract.split())):
                yield f"asks its subclasses for {', '.join(more)}"

    def _lacks_keys(self, path: str, dotted: str, hook: ReliedOn) -> str | None:
        section: Any = self.section(path)
        if section is None:
            return "is gone: there is no such file"
        for key in dotted.split("."):
            section = section.get(key) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            return "is gone"
        missing = [key for key in hook.needs.split() if key not in section]
        return f"has no {', '.join(missing)}" if missing else None

    def find(self, module: str, dotted: str) -> tuple[str, ast.AST] | None:
        """The definition of a name, and the module it stands in, through imports and base classes."""
        first, _, rest = dotted.partition(".")
        found = self._top_level(module, first, seen=frozenset())
        if found is None or not rest:
            return found
        module, node = found
        if not isinstance(node, ast.ClassDef):
            return None
        for inside, one in self._classes(module, node):
            if (own := dict(_own_members(one)).get(rest)) is not None:
                return inside, own
        return None

    def members(self, module: str, node: ast.ClassDef) -> dict[str, ast.AST]:
        """Methods, fields, attributes set on `self` and constructor parameters, base classes' included."""
        found: dict[str, ast.AST] = {}
        for _, one in reversed(list(self._classes(module, node))):
            found |= dict(_own_members(one))
        return found

    def _classes(self, module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        """The class and its base classes, with the module that each stands in."""
        yield module, node
        for base in node.bases:
            found = self.find(module, base.id) if isinstance(base, ast.Name) else None
            if found is not None and isinstance(found[1], ast.ClassDef) and found[1] is not node:
                yield from self._classes(found[0], found[1])

    def _top_level(self, module: str, name: str, seen: frozenset[tuple[str, str]]) -> tuple[str, ast.AST] | None:
        tree = self.module(module)
        if tree is None or (module, name) in seen:
            return None
        seen |= {(module, name)}
        for node in _statements(tree.body):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == name:
                return module, node
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and name in _targets(node):
                return module, node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if alias.name == "*" or (alias.asname or alias.name) == name:
                        wanted = name if alias.name == "*" else alias.name
                        found = self._top_level(self._absolute(module, node), wanted, seen)
                        if found is not None:
                            return found
        return None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        keep = len(parts) - node.level + (1 if self._file(module).name == "__init__.py" else 0)
        return ".".join([*parts[:keep], *([node.module] if node.module else [])])

    def _file(self, module: str) -> Path:
        path = self.folder.joinpath(*module.split(".")[1:])
        package = path / "__init__.py"
        return package if package.exists() else path.with_suffix(".py")

    def _module(self, dotted: str) -> ast.Module | None:
        if dotted.split(".")[0] != "verl" or not self._file(dotted).exists():
            return None
        return ast.parse(self._file(dotted).read_text(encoding="utf-8"))

    def _section(self, path: str) -> Any:
        file = self.folder / path
        return yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else None


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a module, in branches and after `try` too."""
    for node in body:
        yield node
        for inner in ("body", "orelse", "finalbody"):
            if isinstance(node, (ast.If, ast.Try, ast.With)):
                yield from _statements(getattr(node, inner, []))
        for handler in getattr(node, "handlers", []):
            yield from _statements(handler.body)


def _targets(node: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}


def _own_members(node: ast.ClassDef) -> Iterator[tuple[str, ast.AST]]:
    for item in node.body:
        if isinstance(item, (ast.Assign, ast.AnnAssign)):
            yield from ((name, item) for name in _targets(item))
        if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for leaf in ast.walk(item):
                target = isinstance(leaf, ast.Attribute) and isinstance(leaf.ctx, ast.Store)
                if target and isinstance(leaf.value, ast.Name) and leaf.value.id == "self":  # pyright: ignore[reportAttributeAccessIssue]
                    yield leaf.attr, leaf  # pyright: ignore[reportAttributeAccessIssue]
            if item.name == "__init__":
                yield from ((name, item) for name in _parameters(item))
    yield from ((item.name, item) for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)))


def _parameters(node: ast.AST) -> set[str]:
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return set()
    return {a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}


def _said(node: ast.AST) -> set[str]:
    """Names, attributes, keywords (with = too), parameters, imported names and strings of a piece of source."""
    said: set[str] = set()
    for leaf in ast.walk(node):
        match leaf:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.arg(arg=word) | ast.alias(name=word):
                said.add(word)
            case ast.keyword(arg=str(word)):
                said |= {word, f"{word}="}
            case ast.Constant(value=str(word)):
                said.add(word)
    return said

"""What of this package goes into verl's tree, under which name, with which imports."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import opd

ROOT = Path(opd.__file__).parent
TREE = "opd.integrations.verl.patch.tree"
CORE = "verl.trainer.ppo.opd_core"
FACE = "verl.trainer.ppo.on_policy_distillation"
PLUGIN = "opd.integrations.verl.plugin"
STARTS = ("opd.losses", "opd.kernels.rows.closed_form", f"{PLUGIN}.on_policy_distillation", f"{TREE}.step")
"""Modules that are copied, with everything that they import."""
PACKAGES = {
    CORE: "The losses and row passes of on-policy distillation, copied from the package opd.",
    f"{CORE}.kernels": "Losses from rows of logits, without autograd's copies.",
    f"{CORE}.kernels.rows": "Row passes.",
}
"""Packages whose own `__init__` would import more than is copied."""
LICENSE = "# SPDX-License-Identifier: Apache-2.0\n"


def new_name(module: str) -> str:
    """The name in verl's tree of a module of ours."""
    if module == f"{PLUGIN}.on_policy_distillation":
        return FACE
    if module.startswith(f"{PLUGIN}."):
        return CORE + module.removeprefix(PLUGIN)
    if module == TREE or module.startswith(f"{TREE}."):
        return CORE + module.removeprefix(TREE)
    if module.startswith("opd.teachers."):
        return CORE + module.removeprefix("opd.teachers")
    return CORE + module.removeprefix("opd")


def copied_files(version: str) -> dict[str, str]:
    """Path in verl's tree → text, of every copied module and the packages around them. `version` is ours."""
    files = {_path(name, True): f'{LICENSE}"""{says}"""\n' for name, says in PACKAGES.items()}
    for module in sorted(_closure()):
        source = _file(module)
        is_package = source.name == "__init__.py"
        head = f"{LICENSE}# Copied from {module} of opd {version} by `opd verl patch build`; change it there.\n"
        files[_path(new_name(module), is_package)] = head + rewritten(source.read_text(encoding="utf-8"))
    return dict(sorted(files.items()))


def rewritten(text: str) -> str:
    """`text` with imports, and names of modules in strings, that hold in verl's tree."""

    def renamed(found: re.Match[str]) -> str:
        return found[1] + new_name(found[2])

    text = re.sub(r"(^\s*(?:from|import) )(opd(?:\.\w+)*)", renamed, text, flags=re.MULTILINE)
    left = re.search(r"\b(?:from|import) opd\b", text)
    assert left is None, f"an import was left as it was: {left}"
    return text


def _closure() -> set[str]:
    found: set[str] = set()
    waiting: list[str] = [*STARTS]
    while waiting:
        module = waiting.pop()
        if module in found or new_name(module) in PACKAGES:
            continue
        found.add(module)
        waiting.extend(_imports(module))
    return found


def _imports(module: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(_file(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "opd":
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names if _is_module(f"{node.module}.{name.name}"))


def _is_module(name: str) -> bool:
    return _candidate(name) is not None


def _file(module: str) -> Path:
    path = _candidate(module)
    assert path is not None, f"{module} is imported but is no module"
    return path


def _candidate(module: str) -> Path | None:
    where = ROOT.joinpath(*module.split(".")[1:])
    return next((p for p in (where.with_suffix(".py"), where / "__init__.py") if p.exists()), None)


def _path(module: str, is_package: bool) -> str:
    return module.replace(".", "/") + ("/__init__.py" if is_package else ".py")

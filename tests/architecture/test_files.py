"""Files that say what they hold, and end before the reader tires."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import opd

SOURCE = Path(opd.__file__).parent
ROOT = SOURCE.parents[1]
FILES = sorted(SOURCE.rglob("*.py"))
FORBIDDEN_NAMES = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
MAX_LINES = 400
MAX_FUNCTION_LINES = 60
LONGER: dict[str, int] = {}
MAY_BE_LONG = ("kernels/",)  # splitting a kernel hurts


def _name(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def test_no_file_is_called_utils():
    assert not [_name(path) for path in FILES if path.name in FORBIDDEN_NAMES]


def test_files_stay_short():
    lengths = {_name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    long = {n: c for n, c in lengths.items() if c > LONGER.get(n, MAX_LINES) and not n.startswith(MAY_BE_LONG)}
    assert not long


def test_functions_stay_short():
    long = [
        f"{_name(path)}:{node.lineno} {node.name}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES
        and not _name(path).startswith(MAY_BE_LONG)
    ]
    assert not long


def test_the_five_hops_to_the_gradient_are_where_contributing_says():
    """Each hop names things in a file, which hold; the first is a link of the README."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("## From the README to the gradient in five hops")[1].split("\n## ")[0]
    hops = re.findall(r"^\d\. (.*)$", section, flags=re.MULTILINE)
    assert len(hops) == 5
    assert "](src/opd/kernels/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    for hop in hops[1:]:
        names = re.findall(r"`([^`]+)`", hop)
        (path,) = [name for name in names if name.endswith(".py")]
        source = (ROOT / path).read_text(encoding="utf-8")
        assert names[0] != path and all(name in source for name in names if name != path), hop


def test_every_file_says_what_it_is():
    assert not [_name(path) for path in FILES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]

"""Forks differ by a line here and there: whatever the line, the patch goes in rightly, or not at all."""

from __future__ import annotations

import difflib
import random
import shutil
from pathlib import Path

import pytest
from patch_trees import NEWEST, make_tree, script, small_files, state, touched

NEAR = 6
"""Lines around a hook in which half of the edits are, because far from it every edit is harmless."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def lines_of(content: bytes) -> list[str]:
    return content.decode().splitlines(keepends=True)


def hook_lines(before: list[str], after: list[str]) -> list[int]:
    """Where something is inserted."""
    blocks = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    return [i for tag, i, *_ in blocks if tag == "insert"]


def edited(lines: list[str], at: int, kind: str) -> list[str]:
    if kind == "delete":
        return lines[:at] + lines[at + 1 :]
    if kind == "insert":
        return [*lines[:at], "# a line of a fork\n", *lines[at:]]
    return [*lines[:at], lines[at].rstrip("\n") + "  # a fork\n", *lines[at + 1 :]]


def with_hooks(before: list[str], after: list[str], at: int, kind: str) -> list[list[str]]:
    """`after` with the same edit made to the same line: what a right application gives.

    A line inserted exactly where a hook is may stand on either side of it; both are right.
    """
    blocks = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    grown = [(i, j2 - j1) for tag, i, _, j1, j2 in blocks if tag == "insert"]
    low = at + sum(n for i, n in grown if i < at)
    high = at + sum(n for i, n in grown if i <= at)
    return [edited(after, place, kind) for place in ({low, high} if kind == "insert" else {high})]


@pytest.mark.parametrize("edits", [40, pytest.param(200, marks=pytest.mark.endurance)])
def test_single_line_edits_are_merged_or_refused(tmp_path: Path, edits: int):
    pristine = small_files(NEWEST)
    whole = make_tree(tmp_path / "whole", pristine)
    assert script(whole).returncode == 0
    patched = {path: (whole / path).read_bytes() for path in pristine}
    changed = [path for kind, path in touched() if kind == "changed"]
    others = sorted(pristine.keys() - set(changed) - {"verl/version/version"})
    draw = random.Random(0)
    outcomes = {"applied": 0, "refused": 0}
    for number in range(edits):
        path = draw.choice(changed if number % 10 else others)
        before, after = lines_of(pristine[path]), lines_of(patched[path])
        at = draw.randrange(len(before))
        if number % 2 and path in changed:
            at = draw.choice(hook_lines(before, after)) + draw.randrange(-NEAR, NEAR)
        kind = draw.choice(("change", "change", "insert", "delete"))
        fork = edited(before, at, kind)
        tree = make_tree(tmp_path / f"verl fork {number}", {**pristine, path: "".join(fork).encode()})
        start = state(tree)
        tool = {"OPD_PATCH_WITHOUT_GIT": "1"} if number % 4 == 3 else {}
        done = script(tree, **tool)
        told = f"edit {number}: {kind} line {at + 1} of {path}\n{done.stdout}{done.stderr}"
        if done.returncode == 0:
            outcomes["applied"] += 1
            rest = {p: (tree / p).read_bytes() for p in pristine if p != path}
            assert rest == {p: patched[p] for p in rest}, told
            assert lines_of((tree / path).read_bytes()) in with_hooks(before, after, at, kind), told
            assert script("--reverse", tree, **tool).returncode == 0, told
            assert state(tree) == start, told
        else:
            outcomes["refused"] += 1
            assert path in done.stderr, told
        assert state(tree) == start, told
        shutil.rmtree(tree)
    assert min(outcomes.values()) >= edits // 20, outcomes

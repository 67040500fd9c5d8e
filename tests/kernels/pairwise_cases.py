"""Few cases for many parameters: every pair of values in the default run, and the full product under the mark `product`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from kernel_cases import named


@dataclass
class Table:
    """The cases of one test: those without a mark hold every pair of values, the others make the product full."""

    values: dict[str, tuple[Any, ...]]
    cases: list[Any]


TABLES: list[Table] = []


def pairwise(**values: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize by every pair of values; the rest of the product carries the mark `product`."""
    columns = {name: tuple(column) for name, column in values.items()}
    chosen = set(all_pairs([len(column) for column in columns.values()]))
    cases = []
    for index in itertools.product(*(range(len(column)) for column in columns.values())):
        case = [column[i] for column, i in zip(columns.values(), index, strict=True)]
        marks = () if index in chosen else (pytest.mark.product,)
        cases.append(pytest.param(*case, id="+".join(map(named, case)), marks=marks))
    TABLES.append(Table(columns, cases))
    return pytest.mark.parametrize(",".join(columns), cases)


def all_pairs(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Few index tuples in which every pair of values of every two columns occurs; always the same ones."""
    columns = list(itertools.combinations(range(len(sizes)), 2))
    missing = {(i, j, a, b) for i, j in columns for a in range(sizes[i]) for b in range(sizes[j])}
    chosen: list[tuple[int, ...]] = []
    while missing:
        i, j, a, b = min(missing)
        fixed = {i: a, j: b}
        for k, size in enumerate(sizes):
            if k not in fixed:
                fixed[k] = _best(k, size, fixed, missing, len(chosen))
        case = tuple(fixed[k] for k in range(len(sizes)))
        missing -= {(i, j, case[i], case[j]) for i, j in columns}
        chosen.append(case)
    return chosen


def _best(k: int, size: int, fixed: dict[int, int], missing: set[tuple[int, int, int, int]], turn: int) -> int:
    """The value of column k that covers most of what is missing, given those of other columns; among equals, each in turn."""

    def gain(value: int) -> tuple[int, int]:
        pairs = [(k, m, value, held) if k < m else (m, k, held, value) for m, held in fixed.items()]
        return sum(pair in missing for pair in pairs), (value - turn) % size

    return max(range(size), key=gain)

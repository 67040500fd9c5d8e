"""The default kernel cases are few, and yet every pair of values occurs among them."""

from __future__ import annotations

import itertools

import pytest
import test_accuracy  # noqa: F401 (its tables are looked at)
import test_exactness  # noqa: F401
import test_minimal  # noqa: F401
from pairwise_cases import TABLES, all_pairs


@pytest.mark.parametrize("table", TABLES, ids=lambda table: "-".join(table.values))
def test_every_pair_of_values_occurs_in_a_default_case(table):
    names = list(table.values)
    default = [case.values for case in table.cases if not case.marks]
    for (i, one), (j, other) in itertools.combinations(enumerate(names), 2):
        seen = {(repr(case[i]), repr(case[j])) for case in default}
        wanted = {(repr(a), repr(b)) for a in table.values[one] for b in table.values[other]}
        assert seen == wanted, f"{one} and {other}"


@pytest.mark.parametrize("table", TABLES, ids=lambda table: "-".join(table.values))
def test_the_default_cases_and_the_product_are_every_case_once(table):
    cases = [tuple(repr(value) for value in case.values) for case in table.cases]
    every = {tuple(map(repr, case)) for case in itertools.product(*table.values.values())}
    assert len(cases) == len(set(cases)) and set(cases) == every
    default = [case for case in table.cases if not case.marks]
    assert len(default) <= len(every) / 2, "a pairwise table that leaves nothing out"


def test_pairs_are_covered_by_few_cases():
    chosen = all_pairs([3, 3, 3])
    assert len(chosen) <= 11 and all(len(case) == 3 for case in chosen)
    assert len({case[:2] for case in chosen}) == len({case[1:] for case in chosen}) == 9

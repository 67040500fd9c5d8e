"""Two and four processes take the steps that one process takes: the same rollouts, loss, gradients and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rank_cases import CASES, make_school
from rank_checks import (
    Taken,
    assert_same_gradients,
    assert_same_metrics,
    assert_same_rollouts,
    assert_same_weights,
    run_cases,
)

from opd.ranks import shares

PROGRAM = Path(__file__).with_name("rank_cases.py")
WORLDS = (1, 2, 4)


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[int, dict[str, Any]]:
    """By the number of ranks, what rank 0 has seen of every case."""
    school, results = tmp_path_factory.mktemp("school"), tmp_path_factory.mktemp("results")
    make_school(school)
    return run_cases(PROGRAM, school, results, WORLDS)


every_case = pytest.mark.parametrize("case", CASES)
several = pytest.mark.parametrize("world", [2, 4])


def pair(seen: dict[int, dict[str, Any]], world: int, case: str) -> tuple[Taken, Taken]:
    """What one process has seen of a case, and what `world` ranks have."""
    return seen[1]["cases"][case], seen[world]["cases"][case]


@several
@every_case
def test_ranks_sample_the_rollouts_of_one_process(seen, world, case):
    assert_same_rollouts(*pair(seen, world, case), case)


@several
@every_case
def test_every_gradient_is_that_of_one_process(seen, world, case):
    assert_same_gradients(*pair(seen, world, case), case)


@several
@every_case
def test_three_updates_give_the_weights_of_one_process_on_every_rank(seen, world, case):
    assert seen[world]["apart"] == []
    assert_same_weights(*pair(seen, world, case), case)


@several
@every_case
def test_metrics_are_of_the_whole_batch(seen, world, case):
    assert_same_metrics(*pair(seen, world, case), case)


def test_shares_hold_every_place_once_and_differ_by_at_most_one_sequence():
    costs = [7, 1, 5, 3, 3, 9, 2, 2]
    for world in (1, 2, 3, 4, 11):
        found = shares(costs, world)
        assert sorted(place for share in found for place in share) == list(range(len(costs)))
        sums = [sum(costs[i] for i in share) for share in found]
        assert max(sums) - min(sums) <= max(costs)
    assert [sum(costs[i] for i in share) for share in shares(costs, 2)] == [16, 16]

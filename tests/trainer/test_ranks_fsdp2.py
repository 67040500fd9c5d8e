"""With their weights divided between them, two and four ranks take the steps that one process takes, and each has its part of the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fsdp2_cases import cases_of, make_divided_school
from rank_checks import (
    Taken,
    assert_same_gradients,
    assert_same_metrics,
    assert_same_rollouts,
    assert_same_weights,
    run_cases,
)

PROGRAM = Path(__file__).with_name("fsdp2_cases.py")
WORLDS = (1, 2, 4)
TOP_K = 1e-5
"""Where log(1 − Σ p) of a small tail loses digits: the model has two layers, and ddp is as far from one process here."""
ROUNDED_UP = 1.15
"""A rank has at most a row more of each tensor than its share, in models with vectors of 8 numbers."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[int, dict[str, Any]]:
    """By the number of ranks, what rank 0 has seen of every case."""
    school, results = tmp_path_factory.mktemp("school"), tmp_path_factory.mktemp("results")
    make_divided_school(school)
    return run_cases(PROGRAM, school, results, WORLDS)


every_case = pytest.mark.parametrize(("world", "case"), [(world, case) for world in (2, 4) for case in cases_of(world)])
several = pytest.mark.parametrize("world", [2, 4])


def pair(seen: dict[int, dict[str, Any]], world: int, case: str) -> tuple[Taken, Taken]:
    """What one process has seen of a case, and what `world` ranks have."""
    return seen[1]["cases"][case], seen[world]["cases"][case]


@every_case
def test_ranks_with_divided_weights_sample_the_rollouts_of_one_process(seen, world, case):
    assert_same_rollouts(*pair(seen, world, case), case)


@every_case
def test_every_gradient_is_that_of_one_process_with_whole_weights(seen, world, case):
    assert_same_gradients(*pair(seen, world, case), case, TOP_K)


@every_case
def test_three_updates_of_divided_weights_give_those_of_one_process(seen, world, case):
    assert seen[world]["apart"] == []
    assert_same_weights(*pair(seen, world, case), case)


@every_case
def test_metrics_of_divided_weights_are_of_the_whole_batch(seen, world, case):
    assert_same_metrics(*pair(seen, world, case), case)


@several
def test_every_rank_has_its_part_of_weights_gradients_moments_and_teacher(seen, world):
    ranks = seen[world]["bytes"]
    whole = ranks[0]["whole"]
    parts = {"weights": whole, "gradients": whole, "moments": 2 * whole, "teacher": ranks[0]["teacher's whole"]}
    for what, size in parts.items():
        assert sum(rank[what] for rank in ranks) == pytest.approx(size, rel=0.1), what
        assert max(rank[what] for rank in ranks) <= ROUNDED_UP * size / world, what


@several
def test_an_update_gathers_the_output_layer_once_for_all_micro_batches(seen, world):
    ranks = seen[world]["bytes"]
    assert [rank["gathers"] for rank in ranks] == [1] * world
    assert max(rank["micro-batches"] for rank in ranks) > 1

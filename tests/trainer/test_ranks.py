"""Two and four processes take the steps that one process takes: the same rollouts, loss, gradients and weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_cases import CASES, MUON, STEPS, make_school

from opd.ranks import shares

PROGRAM = Path(__file__).with_name("rank_cases.py")
WORLDS = (1, 2, 4)
GRADIENT = 1e-6
"""Relative to the largest number of the model's gradient: float32, summed in another order."""
TOP_K = 5e-6
"""The same where log(1 − Σ p) of a small tail loses digits that the logits' own rounding decides."""
WEIGHT = 1e-5
"""After three updates at a rate of 3e-3, where a gradient is more than rounding."""
RATE = 3e-3
"""The same for all entries: AdamW divides by the gradient's own size, so that one that is nothing but rounding moves its weight too."""
QUIET = 1e-5  # of the largest number of the gradient: below it, rounding of 1e-7 is more than a hundredth
RARE = 2e-3  # entries of a matrix: two in a thousand
MUON_WEIGHT = 5e-4
"""The same with Muon, whose Newton-Schulz steps are bfloat16."""
NUMBER = 2e-5
"""Of metrics, which are those of the weights and of the gradient."""
ROUNDING = ("sampler_student_gap", "rl/reference_kl", "overlap")
"""Metrics that are nothing but rounding, or a step function of it."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[int, dict[str, Any]]:
    """By the number of ranks, what rank 0 has seen of every case."""
    school, results = tmp_path_factory.mktemp("school"), tmp_path_factory.mktemp("results")
    make_school(school)
    paths = os.pathsep.join([str(PROGRAM.parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(school), str(results), *map(str, WORLDS)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {world: torch.load(results / f"{world}.pt", weights_only=False) for world in WORLDS}


every_case = pytest.mark.parametrize("case", CASES)
several = pytest.mark.parametrize("world", [2, 4])


@several
@every_case
def test_ranks_sample_the_rollouts_of_one_process(seen, world, case):
    for step in range(STEPS):
        one, other = (seen[w]["cases"][case]["steps"][step] for w in (1, world))
        assert other["rollouts"] == one["rollouts"]
        for own, theirs in zip(one["logp"], other["logp"], strict=True):
            assert (own is None) == (theirs is None)
            assert own is None or list(theirs) == pytest.approx(list(own), abs=MUON_WEIGHT if case == MUON else NUMBER)


@several
@every_case
def test_every_gradient_is_that_of_one_process(seen, world, case):
    one, other = (seen[w]["cases"][case]["gradients"] for w in (1, world))
    assert len(one) == len(other) == STEPS
    own, theirs = one[0], other[0]  # of the same weights
    assert own.keys() == theirs.keys() and own
    bound = TOP_K if "top-k" in case else GRADIENT
    largest = max(float(g.abs().max()) for g in own.values())
    for name, gradient in own.items():
        assert float((gradient - theirs[name]).abs().max()) <= bound * largest, name
        if float(gradient.norm()) > 1e-3 * largest:
            assert float((gradient - theirs[name]).norm()) <= 2 * bound * float(gradient.norm()), name


@several
@every_case
def test_three_updates_give_the_weights_of_one_process_on_every_rank(seen, world, case):
    assert seen[world]["apart"] == []
    one, other = (seen[w]["cases"][case]["weights"] for w in (1, world))
    gradients = seen[1]["cases"][case]["gradients"]
    assert one.keys() == other.keys()
    largest = max(float(g.abs().max()) for g in gradients[0].values())
    for name, weight in one.items():
        apart = (weight - other[name]).abs()
        smallest = torch.stack([of_step[name].abs() for of_step in gradients]).amin(0)
        assert float(apart.max()) <= RATE, name
        bound = MUON_WEIGHT if case == MUON else WEIGHT
        assert bool((apart[smallest > QUIET * largest] <= bound).all()), name
        assert float((apart > WEIGHT).double().mean()) < RARE or case == MUON, name


@several
@every_case
def test_metrics_are_of_the_whole_batch(seen, world, case):
    bound = MUON_WEIGHT if case == MUON else NUMBER
    for step in range(STEPS):
        one, other = (seen[w]["cases"][case]["steps"][step] for w in (1, world))
        assert other["metrics"].keys() == one["metrics"].keys()
        for name, value in one["metrics"].items():
            if name not in ROUNDING:
                assert other["metrics"][name] == pytest.approx(value, rel=bound, abs=bound), name
        assert other["views"] == one["views"]
        assert other["per_token"].keys() == one["per_token"].keys()
    one, other = (seen[w]["cases"][case]["evaluation"] for w in (1, world))
    assert other == pytest.approx(one, rel=bound, abs=bound)


def test_shares_hold_every_place_once_and_differ_by_at_most_one_sequence():
    costs = [7, 1, 5, 3, 3, 9, 2, 2]
    for world in (1, 2, 3, 4, 11):
        found = shares(costs, world)
        assert sorted(place for share in found for place in share) == list(range(len(costs)))
        sums = [sum(costs[i] for i in share) for share in found]
        assert max(sums) - min(sums) <= max(costs)
    assert [sum(costs[i] for i in share) for share in shares(costs, 2)] == [16, 16]

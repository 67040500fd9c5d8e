"""What is compared between the steps of several ranks and those of one process, and how far the two may be apart."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_cases import MUON, STEPS

GRADIENT = 2e-6
"""Relative to the largest number of the model's gradient: float32, summed in another order. Products with AVX-512 stay within 1e-6 in all
cases; with AVX2, whose sums have other orders for other shapes, 1.3e-6 was seen."""
TOP_K = 5e-6
"""The same where log(1 − Σ p) of a small tail loses digits that the logits' own rounding decides."""
WEIGHT = 2e-5
"""After three updates at a rate of 3e-3, where a gradient is more than rounding."""
RATE = 3e-3
"""The same for all entries: AdamW divides by the gradient's own size, so that one that is nothing but rounding moves its weight too."""
QUIET = 1e-5  # of the largest number of the gradient: below it, rounding of 1e-7 is more than a hundredth
RARE = 2e-3  # entries of a matrix: two in a thousand
MUON_WEIGHT = 1e-3
"""The same with Muon, whose Newton-Schulz steps are bfloat16."""
NUMBER = 5e-5
"""Of metrics, which are those of the weights and of the gradient."""
ROUNDING = ("sampler_student_gap", "rl/reference_kl", "overlap")
"""Metrics that are nothing but rounding, or a step function of it."""

Taken = dict[str, Any]
"""What `rank_cases.taken` returns."""


def assert_same_rollouts(one: Taken, other: Taken, case: str) -> None:
    """The same tokens and texts in every step, with log-probs within rounding."""
    for step in range(STEPS):
        own, theirs = one["steps"][step], other["steps"][step]
        assert theirs["rollouts"] == own["rollouts"]
        for ours, also in zip(own["logp"], theirs["logp"], strict=True):
            assert (ours is None) == (also is None)
            assert ours is None or list(also) == pytest.approx(list(ours), abs=MUON_WEIGHT if case == MUON else NUMBER)


def assert_same_gradients(one: Taken, other: Taken, case: str, top_k: float = TOP_K) -> None:
    """Every parameter's gradient in the first step, of the same weights; `top_k` is the bound of cases of that name."""
    assert len(one["gradients"]) == len(other["gradients"]) == STEPS
    own, theirs = one["gradients"][0], other["gradients"][0]
    assert own.keys() == theirs.keys() and own
    bound = top_k if "top-k" in case else GRADIENT
    largest = max(float(g.abs().max()) for g in own.values())
    for name, gradient in own.items():
        assert float((gradient - theirs[name]).abs().max()) <= bound * largest, name
        if float(gradient.norm()) > 1e-3 * largest:
            assert float((gradient - theirs[name]).norm()) <= 2 * bound * float(gradient.norm()), name


def assert_same_weights(one: Taken, other: Taken, case: str) -> None:
    """After all steps; where gradients are nothing but rounding, within a step's size."""
    gradients = one["gradients"]
    assert one["weights"].keys() == other["weights"].keys()
    largest = max(float(g.abs().max()) for g in gradients[0].values())
    for name, weight in one["weights"].items():
        apart = (weight - other["weights"][name]).abs()
        smallest = torch.stack([of_step[name].abs() for of_step in gradients]).amin(0)
        assert float(apart.max()) <= RATE, name
        bound = MUON_WEIGHT if case == MUON else WEIGHT
        assert bool((apart[smallest > QUIET * largest] <= bound).all()), name
        assert float((apart > WEIGHT).double().mean()) < RARE or case == MUON, name


def assert_same_metrics(one: Taken, other: Taken, case: str) -> None:
    """Of every step and of the evaluation, with the same views and distances per rollout."""
    bound = MUON_WEIGHT if case == MUON else NUMBER
    for step in range(STEPS):
        own, theirs = one["steps"][step], other["steps"][step]
        assert theirs["metrics"].keys() == own["metrics"].keys()
        for name, value in own["metrics"].items():
            if name not in ROUNDING:
                assert theirs["metrics"][name] == pytest.approx(value, rel=bound, abs=bound), name
        assert theirs["views"] == own["views"]
        assert theirs["per_token"].keys() == own["per_token"].keys()
    assert other["evaluation"] == pytest.approx(one["evaluation"], rel=bound, abs=bound)


def run_program(program: Path, *words: object, timeout: float = 400, **environment: str) -> str:
    """What a program of this folder prints. It has to end well, within `timeout` seconds."""
    paths = os.pathsep.join([str(program.parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(program), *map(str, words)],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_cases(program: Path, school: Path, results: Path, worlds: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Run a program of cases on each number of ranks; by that number, what its rank 0 has seen."""
    run_program(program, school, results, *worlds)
    return {world: torch.load(results / f"{world}.pt", weights_only=False) for world in worlds}

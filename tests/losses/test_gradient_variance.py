"""The noise of one rollout's gradient: every response listed, and responses drawn."""

import csv
import math

import pytest
import torch
from benchmarks import RESULTS
from benchmarks.losses.command import README
from benchmarks.variance.command import enumerated, measure, methods, problems, simulated, wanted_gradient

DRAWS = 20_000
CASES = [(problem, method) for problem in problems() for method in methods(problem)]
IDS = [f"{problem.name}: {method.name}" for problem, method in CASES]


@pytest.mark.parametrize(("problem", "method"), CASES, ids=IDS)
def test_drawn_rollouts_have_the_mean_and_the_variance_of_the_enumeration(problem, method):
    """Within four standard errors, which the enumeration itself gives."""
    exact = enumerated(problem, method, DRAWS)
    for seed in range(2):
        drawn = simulated(problem, method, DRAWS, seed)
        assert abs(drawn.variance - exact.variance) <= 4 * exact.variance_error + 1e-12
        assert float((drawn.mean - exact.mean).norm()) <= 4 * math.sqrt(exact.variance / DRAWS) + 1e-12
        assert drawn.variance_error == pytest.approx(exact.variance_error, rel=0.5, abs=1e-12)


@pytest.mark.parametrize(("problem", "method"), CASES, ids=IDS)
def test_every_method_but_the_bucket_has_the_gradient_that_is_wanted_in_the_mean(problem, method):
    wanted = wanted_gradient(problem, method)
    bias = float((enumerated(problem, method, DRAWS).mean - wanted).norm() / wanted.norm())
    if "bucket" in method.name:
        assert 0.01 < bias < 0.5
    else:
        assert bias < 1e-12


def test_the_probabilities_of_all_responses_sum_to_one_and_are_those_drawn():
    for problem in problems():
        responses = problem.every_response()
        p = problem.logp(responses).exp()
        assert float(p.sum()) == pytest.approx(1.0, abs=1e-12)
        drawn = problem.draw(DRAWS, torch.Generator().manual_seed(0))
        places = problem.vocab ** torch.arange(problem.length - 1, -1, -1)
        counts = torch.bincount((drawn * places).sum(1), minlength=len(p)) / DRAWS
        assert ((counts - p).abs() <= 5 * (p * (1 - p) / DRAWS).sqrt() + 2 / DRAWS).all()


def test_one_position_repeats_the_numbers_of_the_loss_readme():
    (problem, _) = problems()
    found = {m.name: enumerated(problem, m, DRAWS).variance for m in methods(problem)}
    text = README.read_text(encoding="utf-8")
    for row in (
        f"| 8 | 0 (rounding) | {found['top-8 + sampled tail']:.4f} |",
        f"| −k1 as an advantage | 0.4357 | 1.000 | 0 (rounding) | 0.42 | {found['sampled']:.3f} |",
        f"| −k1 as an advantage, value baseline | 0.4357 | 1.000 | 0 (rounding) | 0.42 | {found['sampled + baseline']:.3f} |",
    ):
        assert row in text


def test_the_kept_table_is_what_is_measured():
    with (RESULTS / "gradient_variance.csv").open(encoding="utf-8") as file:
        kept = list(csv.DictReader(file))
    found = [row for problem in problems() for row in measure(problem, 10)]
    assert [(r["problem"], r["method"]) for r in kept] == [(r["problem"], r["method"]) for r in found]
    for old, new in zip(kept, found, strict=True):
        for name in ("gradient_norm", "variance_enumerated", "rollouts_for_snr_1"):
            assert float(old[name]) == pytest.approx(new[name], rel=1e-9, abs=1e-12)
        assert (
            abs(float(old["variance_simulated"]) - new["variance_enumerated"])
            <= 4 * float(old["standard_error"]) + 1e-12
        )

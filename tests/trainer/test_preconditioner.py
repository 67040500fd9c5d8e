"""The natural gradient's preconditioner: from gradients whose covariance is the Fisher matrix, to the same solution by another path."""

from __future__ import annotations

import pytest
import torch
from test_natural_gradient import World, random_vector
from test_natural_gradient_training import batches_of, student_of

from opd.config.optimizer import NaturalGradientConfig
from opd.errors import ConfigError
from opd.losses import Objective
from opd.optim import preconditioner
from opd.optim.natural_gradient import Fisher, conjugate_gradient, flatten
from opd.optim.preconditioner import Kronecker
from opd.testing import tiny_causal_lm

COVARIANCE_ERROR = 0.05  # relative, of 20 000 samples; five seeds of rows had 0.008 to 0.019
HARD = 0.01  # damping with which ten iterations leave a residual


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.mark.parametrize("keep_graphs", [True, False])
def test_samples_have_mean_zero_and_the_fisher_matrix_for_covariance(keep_graphs):
    rows, weight = normal(6, 3, seed=0), normal(4, 3, seed=1).requires_grad_()
    weights = torch.tensor([0.05, 0.1, 0.15, 0.2, 0.2, 0.3], dtype=torch.float64)
    parts = [slice(0, 2), slice(2, 6)]
    fisher = Fisher(
        [weight],
        [rows[part] for part in parts],
        lambda batch: batch @ weight.T,
        [weights[part] for part in parts],
        keep_graphs=keep_graphs,
    )
    drawn = torch.stack([flatten(sample) for sample in fisher.samples(20_000)])
    matrix = torch.stack([fisher(column) for column in torch.eye(12, dtype=torch.float64)])
    assert (drawn.T @ drawn / len(drawn) - matrix).norm() <= COVARIANCE_ERROR * matrix.norm()
    assert drawn.mean(0).abs().max() <= 4 * (matrix.diag().max() / len(drawn)).sqrt()


def factors(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, list[tuple[torch.Tensor, ...]]]:
    """A, B, and samples of a matrix whose second moments are A ⊗ B exactly; and of a vector beside it."""
    a, b = normal(rows, rows, seed=2), normal(columns, columns, seed=3)
    samples = [
        (
            (rows * columns) ** 0.5 * torch.outer(a[:, i], b[:, j]),
            torch.full((2,), float(i), dtype=torch.float64),
        )
        for i in range(rows)
        for j in range(columns)
    ]
    return a @ a.T, b @ b.T, samples


def solved_densely(block: torch.Tensor, vector: torch.Tensor, damping: float) -> torch.Tensor:
    return torch.linalg.solve(block + damping * torch.eye(len(block), dtype=torch.float64), vector)


@pytest.mark.parametrize("damping", [0.3, 0.001])
def test_a_block_that_is_a_kronecker_product_is_solved_exactly(damping):
    a, b, samples = factors(5, 3)
    vector = random_vector(17)
    found = Kronecker(samples, damping)(vector)
    torch.testing.assert_close(found[:15], solved_densely(torch.kron(a, b), vector[:15], damping))
    second_moment = sum(i**2 for i in range(5)) / 5
    torch.testing.assert_close(found[15:], vector[15:] / (second_moment + damping))


def test_a_side_that_is_too_long_has_the_diagonal_of_its_factor(monkeypatch):
    monkeypatch.setattr(preconditioner, "LARGEST_SIDE", 4)
    a, b, samples = factors(5, 3)
    vector = random_vector(17)
    found = Kronecker(samples, 0.1)(vector)[:15]
    torch.testing.assert_close(found, solved_densely(torch.kron(a.diag().diag(), b), vector[:15], 0.1))


def test_no_damping_and_nothing_sampled_still_gives_numbers():
    nothing = [(torch.zeros(3, 2), torch.zeros(2))]
    assert Kronecker(nothing, 0.0)(torch.zeros(8)).isfinite().all()


@pytest.mark.parametrize("probes", [1, 4])
def test_it_is_symmetric_and_positive_definite(world, probes):
    made = Kronecker(world.fisher().samples(probes), HARD)
    size = sum(p.numel() for p in world.parameters)
    for seed in range(3):
        v, w = random_vector(size, seed), random_vector(size, 50 + seed)
        assert v @ made(v) > 0
        assert (v @ made(w)).item() == pytest.approx((w @ made(v)).item(), rel=1e-9)


def test_the_solution_is_the_same_and_every_iterate_descends(world):
    b, fisher = -flatten(world.gradient()), world.fisher()
    dense = solved_densely(world.matrix(), b, HARD)
    made = Kronecker(fisher.samples(4), HARD)

    def solve(iterations: int):
        return conjugate_gradient(fisher, b, damping=HARD, iterations=iterations, tolerance=1e-13, precondition=made)

    whole = solve(4 * len(b))
    assert (whole.x - dense).norm() <= 1e-9 * dense.norm()
    assert (whole.product - (b - HARD * dense)).norm() <= 1e-9 * b.norm()
    for iterations in (1, 5, 10):
        short = solve(iterations)
        assert b @ short.x > 0
        true = (b - fisher(short.x) - HARD * short.x).norm() / b.norm()
        assert short.residual == pytest.approx(true.item(), rel=1e-6)


def test_with_the_whole_matrix_as_preconditioner_one_iteration_is_enough(world):
    b, matrix = -flatten(world.gradient()), world.matrix()
    solved = conjugate_gradient(
        world.fisher(), b, damping=HARD, iterations=1, precondition=lambda r: solved_densely(matrix, r, HARD)
    )
    assert solved.residual < 1e-10
    assert (solved.x - solved_densely(matrix, b, HARD)).norm() <= 1e-9 * solved.x.norm()


def test_the_same_weights_and_rollouts_give_the_same_step(world):
    one, other = world.step(probes=3), world.step(probes=3)
    assert torch.equal(flatten(one.step), flatten(other.step))
    assert (flatten(one.step) - flatten(world.step().step)).norm() > 0.01 * flatten(one.step).norm()


def test_the_recipe_asks_for_it():
    model = tiny_causal_lm(40, hidden=32, initializer_range=0.3, max_positions=64)
    residuals = [
        student_of(model, probes=probes).update(batches_of(10_000), Objective()).metrics["natural/residual"]
        for probes in (0, 4)
    ]
    assert residuals[1] < 0.7 * residuals[0]
    with pytest.raises(ConfigError, match="probes must be 0"):
        NaturalGradientConfig(probes=-1)

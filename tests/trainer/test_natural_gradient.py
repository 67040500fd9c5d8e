"""The natural-gradient step against the Fisher matrix written out, in float64, on models small enough for that."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from opd.data.pack import pack
from opd.errors import ModelError
from opd.models import response_logits
from opd.optim.natural_gradient import Fisher, conjugate_gradient, flatten, natural_gradient_step, unflatten
from opd.testing import random_rollout, tiny_causal_lm

VOCAB = 7
LENGTHS = (1, 5, 3, 2)


class World:
    """A transformer in float64, some rollouts as micro-batches, and a reverse-KL loss to a random teacher. (GPT-2: the norms of
    newer models compute in float32 whatever the dtype.)"""

    def __init__(self, *, architecture="gpt2", budget=10_000, layout="right_padded", reduction="token_mean") -> None:
        self.model = tiny_causal_lm(
            VOCAB,
            hidden=8,
            heads=2,
            kv_heads=1,
            layers=2,
            max_positions=16,
            initializer_range=0.5,
            architecture=architecture,
        ).double()
        rollouts = [random_rollout(2 + i, n, VOCAB, seed=i, index=i) for i, n in enumerate(LENGTHS)]
        count = len(rollouts) if reduction == "sequence_mean" else sum(LENGTHS)
        self.batches = pack(
            rollouts,
            None,
            layout=layout,
            tokens_per_microbatch=budget,
            pad_id=0,
            reduction=reduction,
            global_count=count,
        )
        generator = torch.Generator().manual_seed(5)
        table = torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64)
        self.teacher = lambda batch: table[batch.response_ids].log_softmax(-1)
        self.weights = [batch.token_weights.double() for batch in self.batches]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def logits(self, batch) -> torch.Tensor:
        return response_logits(self.model, batch.sequences)

    def loss(self) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for batch, weights in zip(self.batches, self.weights, strict=True):
            logp = self.logits(batch).log_softmax(-1)
            total = total + (weights * (logp.exp() * (logp - self.teacher(batch))).sum(-1)).sum()
        return total

    def gradient(self) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(self.loss(), self.parameters)

    def fisher(self, **options) -> Fisher:
        return Fisher(self.parameters, self.batches, self.logits, self.weights, **options)

    def step(self, **options):
        return natural_gradient_step(
            self.parameters, self.gradient(), self.batches, self.logits, self.weights, **options
        )

    def matrix(self) -> torch.Tensor:
        """F by its definition: every row of every Jacobian, one backward pass each."""
        size = sum(p.numel() for p in self.parameters)
        total = torch.zeros(size, size, dtype=torch.float64)
        for batch, weights in zip(self.batches, self.weights, strict=True):
            logits = self.logits(batch)
            for token, weight in enumerate(weights.tolist()):
                rows = [
                    flatten(torch.autograd.grad(entry, self.parameters, retain_graph=True)) for entry in logits[token]
                ]
                jacobian, p = torch.stack(rows), logits[token].detach().softmax(-1)
                total += weight * jacobian.T @ (p.diag() - torch.outer(p, p)) @ jacobian
        return total

    @torch.no_grad()
    def logp(self) -> list[torch.Tensor]:
        return [self.logits(batch).log_softmax(-1) for batch in self.batches]

    def moved(self, before: list[torch.Tensor]) -> float:
        """KL(before ‖ now), nats per token."""
        pairs = zip(before, self.logp(), self.weights, strict=True)
        return sum(float((w * (b.exp() * (b - now)).sum(-1)).sum()) for b, now, w in pairs)


def random_vector(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def matrix(world) -> torch.Tensor:
    return world.matrix()


@pytest.mark.parametrize("keep_graphs", [True, False])
@pytest.mark.parametrize("budget", [1, 12, 10_000], ids=["four of one", "some", "one of four"])
def test_a_product_equals_that_with_the_explicit_fisher_matrix(matrix, budget, keep_graphs):
    fisher = World(budget=budget).fisher(keep_graphs=keep_graphs)
    for seed in range(3):
        v = random_vector(len(matrix), seed)
        expected = matrix @ v
        assert (fisher(v) - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize(
    ("more", "tolerance"),
    [
        ({"architecture": "qwen3", "layout": "packed"}, 1e-6),
        ({"architecture": "llama", "layout": "left_padded"}, 1e-6),
        ({"reduction": "sequence_mean"}, 1e-10),
    ],
    ids=["qwen3, packed", "llama, left-padded", "sequence mean"],
)
def test_it_does_so_for_other_models_layouts_and_weights(more, tolerance):
    world = World(budget=12, **more)
    v = random_vector(sum(p.numel() for p in world.parameters))
    expected = world.matrix() @ v
    assert (world.fisher()(v) - expected).norm() <= tolerance * expected.norm()


def test_one_softmax_over_two_outcomes_by_hand():
    """p = ½, ½ and z = (θ, 0): F = p(1 − p) = ¼, the gradient of reverse KL to (q, 1 − q) is ¼ (log-odds of S − of T)."""
    theta = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    log_odds = 0.2
    step = natural_gradient_step(
        [theta],
        [torch.tensor([0.25 * (0 - log_odds)], dtype=torch.float64)],
        [None],
        lambda _: torch.cat([theta, theta * 0]).unsqueeze(0),
        [torch.ones(1)],
        damping=0.0,
        trust_region=1.0,
    )
    assert step.step[0].item() == pytest.approx(log_odds)  # the teacher's own log-odds, in one step
    assert step.predicted_kl == pytest.approx(0.5 * 0.25 * log_odds**2)
    assert (step.scale, step.iterations) == (1.0, 1)


def test_fisher_is_symmetric_and_positive_semidefinite(world, matrix):
    fisher, size = world.fisher(), len(matrix)
    for seed in range(5):
        v, w = random_vector(size, seed), random_vector(size, 100 + seed)
        assert v @ fisher(v) > 0
        assert (v @ fisher(w)).item() == pytest.approx((w @ fisher(v)).item(), rel=1e-10)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-12


def test_a_shift_of_all_logits_is_no_move():
    """What p pᵀ is for: adding one number to every logit leaves the distribution as it is."""
    bias = torch.zeros(VOCAB, dtype=torch.float64, requires_grad=True)
    table = torch.randn(4, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fisher = Fisher([bias], [table], lambda rows: rows + bias, [torch.full((4,), 0.25)])
    assert fisher(torch.ones(VOCAB, dtype=torch.float64)).abs().max() < 1e-15


def test_conjugate_gradients_reach_the_dense_solution(world, matrix):
    b = -flatten(world.gradient())
    for damping in (0.3, 0.01):
        solved = conjugate_gradient(world.fisher(), b, damping=damping, iterations=len(b), tolerance=1e-13)
        dense = torch.linalg.solve(matrix + damping * torch.eye(len(b), dtype=torch.float64), b)
        assert (solved.x - dense).norm() <= 1e-9 * dense.norm()
        assert (solved.product - matrix @ dense).norm() <= 1e-9 * (matrix @ dense).norm()
        assert solved.residual < 1e-13 * 10


def test_ten_iterations_report_their_true_residual(world, matrix):
    b = -flatten(world.gradient())
    solved = conjugate_gradient(world.fisher(), b, damping=0.01, iterations=10)
    true = (b - matrix @ solved.x - 0.01 * solved.x).norm() / b.norm()
    assert solved.iterations == 10
    assert solved.residual == pytest.approx(true.item(), rel=1e-6)


def test_no_gradient_gives_no_step(world):
    nothing = [torch.zeros_like(p) for p in world.parameters]
    step = natural_gradient_step(world.parameters, nothing, world.batches, world.logits, world.weights)
    assert (step.iterations, step.residual, step.predicted_kl, step.scale) == (0, 0.0, 0.0, 1.0)
    assert not any(part.any() for part in step.step)


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_the_step_descends_at_any_number_of_iterations(world, iterations):
    step = world.step(iterations=iterations)
    assert flatten(step.step) @ flatten(world.gradient()) < 0


def test_the_step_minimises_the_damped_quadratic_model(world, matrix):
    """g·x + ½ xᵀ(F + damping)x is g·x / 2 at its minimum, and more at any multiple of it."""
    g, damped = flatten(world.gradient()), matrix + 0.01 * torch.eye(len(matrix), dtype=torch.float64)
    x = flatten(world.step(damping=0.01, trust_region=1e9, iterations=len(matrix)).step)
    values = [float(g @ (x * a) + 0.5 * (x * a) @ damped @ (x * a)) for a in (0.9, 1.0, 1.1)]
    assert values[1] == pytest.approx(0.5 * float(g @ x), rel=1e-8)
    assert values[1] < min(values[0], values[2])


def test_the_distributions_move_as_far_as_predicted():
    """KL(before ‖ after) over ½ xᵀFx goes to 1, with an error that shrinks with the step's length, √(trust region)."""
    errors = []
    for trust_region in (1e-2, 1e-4, 1e-6):
        world = World(budget=12)
        before = world.logp()
        step = world.step(trust_region=trust_region)
        assert step.scale < 1
        assert step.predicted_kl == pytest.approx(trust_region, rel=1e-9)
        step.apply(world.parameters)
        errors.append(abs(world.moved(before) / step.predicted_kl - 1))
    assert errors[2] < 2e-3
    assert errors[0] > errors[1] > errors[2]


def test_predicted_kl_is_per_token_whatever_the_weights_sum_to(world):
    """A loss reduced by a fixed count has weights with another sum: the undamped step and its KL per token stay, here bit for bit."""
    steps = [
        natural_gradient_step(
            world.parameters,
            [factor * g for g in world.gradient()],
            world.batches,
            world.logits,
            [factor * w for w in world.weights],
            damping=0.0,
            trust_region=1e9,
        )
        for factor in (1, 4)
    ]
    assert steps[0].predicted_kl == steps[1].predicted_kl
    assert torch.equal(flatten(steps[0].step), flatten(steps[1].step))


def test_a_solution_inside_the_trust_region_is_taken_whole(world):
    small = [1e-4 * g for g in world.gradient()]
    step = natural_gradient_step(world.parameters, small, world.batches, world.logits, world.weights)
    assert step.scale == 1.0
    assert 0 < step.predicted_kl < 0.1


def test_without_damping_the_step_does_not_depend_on_how_a_layer_is_written():
    """W → W/s with s in front of it: gradient descent would change by s², the natural step moves the distributions alike."""

    def moved_logits(scale: float, *, natural: bool) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(12, 3, generator=generator, dtype=torch.float64)
        weight = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        teacher = torch.randn(12, 4, generator=generator, dtype=torch.float64).log_softmax(-1)
        parameter = (weight / scale).requires_grad_()

        def logits(batch: torch.Tensor) -> torch.Tensor:
            return batch @ (scale * parameter).T

        logp = logits(rows).log_softmax(-1)
        gradient = torch.autograd.grad((logp.exp() * (logp - teacher)).sum(-1).mean(), parameter)
        weights = torch.full((12,), 1 / 12, dtype=torch.float64)
        step = natural_gradient_step(
            [parameter], gradient, [rows], logits, [weights], damping=0.0, iterations=50, trust_region=1e-3
        )
        move = step.step[0] if natural else -0.1 * gradient[0]
        after = rows @ (scale * (parameter + move)).T
        return (after.log_softmax(-1) - logp).detach()

    torch.testing.assert_close(moved_logits(5.0, natural=True), moved_logits(1.0, natural=True), rtol=1e-7, atol=1e-10)
    assert (moved_logits(5.0, natural=False) - moved_logits(1.0, natural=False)).norm() > 0.1


def test_impossible_ids_neither_move_nor_spoil(world):
    """Masked vocabulary has logits of −inf."""

    def masked(batch) -> torch.Tensor:
        return world.logits(batch).index_fill(-1, torch.tensor([2]), float("-inf"))

    def without(batch) -> torch.Tensor:
        return world.logits(batch)[:, [i for i in range(VOCAB) if i != 2]]

    v = random_vector(sum(p.numel() for p in world.parameters))
    products = [Fisher(world.parameters, world.batches, f, world.weights)(v) for f in (masked, without)]
    assert products[0].isfinite().all()
    torch.testing.assert_close(products[0], products[1], rtol=1e-10, atol=1e-12)


def test_some_parameters_alone_have_their_block_of_the_matrix(world, matrix):
    named = list(world.model.named_parameters())
    chosen = [p for name, p in named if "h.1" in name]
    kept = torch.cat([torch.full((p.numel(),), "h.1" in name) for name, p in named])
    v = random_vector(int(kept.sum()))
    product = Fisher(chosen, world.batches, world.logits, world.weights)(v)
    expected = matrix[kept][:, kept] @ v
    assert (product - expected).norm() <= 1e-10 * expected.norm()


def test_neither_weights_nor_gradients_are_touched(world):
    before = flatten(world.parameters)
    world.step()
    assert torch.equal(flatten(world.parameters), before)
    assert all(p.grad is None for p in world.parameters)


def test_vectors_and_parameters_are_the_same_numbers(world):
    vector = flatten(world.parameters)
    pieces = unflatten(vector, world.parameters)
    assert all(torch.equal(a, b) for a, b in zip(pieces, world.parameters, strict=True))


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another path"])
def test_an_operation_with_one_derivative_only_is_refused(beside):
    """PyTorch gives no error where another path is left: the derivative of the gradient would just be wrong."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 2 * g * ctx.saved_tensors[0]

    theta = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64, requires_grad=True)
    gradient = [torch.tensor([[0.3, -0.1, -0.2]], dtype=torch.float64)]

    def logits(_: None) -> torch.Tensor:
        return Once.apply(theta) + theta if beside else Once.apply(theta)

    with pytest.raises(ModelError, match=r"differentiates the student twice.*sdpa or eager"):
        natural_gradient_step([theta], gradient, [None], logits, [torch.ones(1)])

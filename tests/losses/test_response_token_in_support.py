"""`include_sampled`: the response token joins a top-k support, and what that does to the expected gradient."""

from __future__ import annotations

import math

import pytest
import torch
from loss_oracles import expected, gradient, relative_error, tail_problem, total_variance

from opd.errors import ObjectiveError
from opd.losses import Objective, partial_divergence, reverse_kl, support_of, to_logp
from opd.types import DenseTarget, TopKTarget

STUDENT = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
TEACHER = torch.tensor([[0.5, 0.1, 0.1, 0.3]], dtype=torch.float64)


def objective(support: str = "teacher_top_k", **settings: object) -> Objective:
    settings = {"top_k": 1, "include_sampled": True} | settings
    return Objective(support=support, **settings)  # pyright: ignore[reportArgumentType]


def loss_of(made: Objective, response: int, target: object = None) -> float:
    given = DenseTarget(logits=TEACHER.log()) if target is None else target
    return made.per_token_loss(STUDENT.log(), given, torch.tensor([response]))[0].item()  # pyright: ignore[reportArgumentType]


def kl(*pairs: tuple[float, float]) -> float:
    return sum(p * math.log(p / q) for p, q in pairs)


def test_a_response_token_outside_the_top_k_is_an_entry_of_its_own():
    assert loss_of(objective(), 2) == pytest.approx(kl((0.4, 0.5), (0.2, 0.1), (0.4, 0.4)), abs=1e-15)
    assert loss_of(objective(tail="generalized"), 2) == pytest.approx(
        kl((0.4, 0.5), (0.2, 0.1)) - (0.4 + 0.2) + (0.5 + 0.1), abs=1e-15
    )
    jsd = loss_of(objective(divergence="generalized_jsd"), 2)
    on_k = support_of(torch.tensor([[0, 2]]))
    wanted = partial_divergence("generalized_jsd", on_k.gather(STUDENT.log()), on_k.gather(TEACHER.log())).item()
    assert jsd == pytest.approx(wanted, abs=1e-15)


def test_a_response_token_inside_the_top_k_counts_once():
    assert loss_of(objective(), 0) == loss_of(objective(include_sampled=False), 0)
    assert loss_of(objective(), 0) == pytest.approx(kl((0.4, 0.5), (0.6, 0.5)), abs=1e-15)


@pytest.mark.parametrize("support", ["teacher_top_k", "student_top_k", "union"])
def test_every_support_takes_the_response_token(support):
    wanted = kl((0.4, 0.5), (0.2, 0.1), (0.4, 0.4))
    assert loss_of(objective(support), 2) == pytest.approx(wanted, abs=1e-15), "token 0 is the likeliest of both"


@pytest.mark.parametrize("shown", [1, 2])
@pytest.mark.parametrize("response", [0, 2, 3])
def test_a_teacher_that_shows_its_top_k_and_the_response_token_gives_the_loss_of_its_logits(shown, response):
    best = TEACHER.log().topk(shown, dim=-1)
    target = TopKTarget(
        ids=best.indices, teacher_logp=best.values, sampled_logp=TEACHER.log()[:, response]
    )  # with two, the second is cut
    for tail in ("bucket", "generalized", "renormalize"):
        made = objective(tail=tail, top_k=1 if tail != "renormalize" else 2)
        if tail != "renormalize" or shown == 2:
            assert loss_of(made, response, target) == pytest.approx(loss_of(made, response), abs=1e-15)


def test_a_teacher_without_the_response_tokens_log_prob_is_refused():
    best = TEACHER.log().topk(1, dim=-1)
    with pytest.raises(ObjectiveError, match=r"the TopKTarget has none.*without include_sampled"):
        loss_of(objective(), 2, TopKTarget(ids=best.indices, teacher_logp=best.values))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"tail": "sampled"}, "over its probability.*drop include_sampled, or use tail='bucket'"),
        ({"support": "full", "top_k": None}, "support='full' has none; drop it"),
        ({"include_sampled": 1.0}, "True or False"),
    ],
)
def test_what_the_response_token_cannot_join_is_refused(settings, why):
    with pytest.raises(ObjectiveError, match=why):
        objective(**settings)


def of_every_draw(made: Objective) -> tuple[torch.Tensor, float]:
    """The expected gradient over the response tokens of one position, and its variance."""
    logits, teacher = tail_problem()
    rows = logits.expand(50, 50).clone().requires_grad_()
    target = DenseTarget(logits=teacher.expand(50, 50))
    loss = made.per_token_loss(rows, target, torch.arange(50))[0]
    per_draw, probability = torch.autograd.grad(loss.sum(), rows)[0], logits.softmax(-1)[0]
    return expected(per_draw, probability), total_variance(per_draw, probability)


BIAS = [  # (k, tail, without the response token, with it, variance with it) as the README says
    (1, "bucket", 0.599, 0.491, 0.0115),
    (1, "generalized", 0.739, 0.611, 0.0179),
    (4, "bucket", 0.501, 0.408, 0.0077),
    (8, "bucket", 0.098, 0.095, 0.0001),
]


@pytest.mark.parametrize(("k", "tail", "without", "with_it", "variance"), BIAS)
def test_the_response_token_lowers_the_bias_of_a_top_k_and_does_not_remove_it(k, tail, without, with_it, variance):
    logits, teacher = tail_problem()
    exact = gradient(lambda z: reverse_kl(to_logp(z), teacher), logits)[0]
    plain, still = of_every_draw(objective(top_k=k, tail=tail, include_sampled=False))
    added, moves = of_every_draw(objective(top_k=k, tail=tail))
    assert (relative_error(plain, exact), still) == (pytest.approx(without, abs=6e-4), pytest.approx(0.0, abs=1e-12))
    assert (relative_error(added, exact), moves) == (
        pytest.approx(with_it, abs=6e-4),
        pytest.approx(variance, abs=6e-5),
    )
    unbiased, varies = of_every_draw(Objective(support="teacher_top_k", top_k=k, tail="sampled"))
    assert relative_error(unbiased, exact) < 1e-12
    assert varies > 40 * moves


def test_training_on_one_token_of_the_teacher_and_the_response_ends_nearer_to_the_teacher():
    start, teacher = tail_problem()
    ends = []
    for include in (False, True):
        made, z = objective(include_sampled=include), start[0].clone()
        for _ in range(200):
            rows = z.expand(50, 50).clone().requires_grad_()
            loss = made.per_token_loss(rows, DenseTarget(logits=teacher.expand(50, 50)), torch.arange(50))[0]
            slope = torch.autograd.grad(loss.sum(), rows)[0]
            z = z - 4.0 * expected(slope, z.softmax(-1))
        ends.append(reverse_kl(to_logp(z[None]), teacher).item())
    assert ends == [pytest.approx(0.16, abs=0.01), pytest.approx(0.05, abs=0.01)]

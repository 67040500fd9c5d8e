"""`token_clip`: a bound on what one token can do to the loss or by its advantage, and the bias that it has."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loss_oracles import expected, gradient, relative_error, tail_problem

from opd.errors import ObjectiveError
from opd.kernels import PolicyTerm, linear_objective, objective_from_logits
from opd.losses import Objective, reverse_kl, to_logp
from opd.types import DenseTarget, Head, HiddenTarget, SampledTarget, TopKTarget

STUDENT = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.5, 0.5]], dtype=torch.float64)
TEACHER = torch.tensor([[0.5, 0.5], [0.1, 0.9], [1.0, 0.0]], dtype=torch.float64)
FAR = 0.9 * math.log(9) - 0.1 * math.log(9)  # KL of the second row; the first is 0, the third infinite
K1: dict[str, Any] = {"support": "sampled", "estimator": "k1", "delivery": "advantage"}


def losses(clip: float | None, **settings: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, `clamped` and gradient of three tokens."""
    logits = STUDENT.log().requires_grad_()
    loss, clamped = Objective(token_clip=clip, **settings).per_token_loss(
        logits, DenseTarget(logits=TEACHER.log()), torch.tensor([0, 0, 1])
    )
    return loss.detach(), clamped, torch.autograd.grad(loss.sum(), logits)[0]


def test_a_divergence_above_the_bound_is_the_bound_and_has_no_gradient():
    loss, clamped, slope = losses(1.0)
    assert loss.tolist() == pytest.approx([0.0, 1.0, 1.0], abs=1e-15)
    assert clamped.tolist() == [0.0, 1.0, 1.0]
    assert (slope == 0).all(), "the first token is at its minimum, the others are bounded"
    loss, clamped, slope = losses(2.0)
    assert loss.tolist() == pytest.approx([0.0, FAR, 2.0], abs=1e-15)
    assert clamped.tolist() == [0.0, 0.0, 1.0]
    assert torch.equal(slope[1], losses(None)[2][1]) and slope[1].norm() > 0.1


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_an_estimator_as_a_loss_is_bounded_too_even_where_it_is_infinite(estimator):
    divergence = "forward_kl" if estimator == "k3" else "reverse_kl"
    plain = losses(None, support="sampled", estimator=estimator, divergence=divergence)
    loss, clamped, slope = losses(1.2, support="sampled", estimator=estimator, divergence=divergence)
    assert plain[0][1] > 1.2 and plain[0][2] == math.inf
    assert loss.tolist() == pytest.approx([0.0, 1.2, 1.2], abs=1e-15) and clamped.tolist() == [0.0, 1.0, 1.0]
    assert (slope == 0).all()


def test_an_advantage_keeps_its_sign_and_a_gradient_at_the_bound():
    loss, clamped, slope = losses(1.0, **K1)
    assert loss.tolist() == pytest.approx([0.0, 1.0, 1.0], abs=1e-15), "log q − log p is 0, −2.2 and −∞"
    assert clamped.tolist() == [0.0, 1.0, 1.0]
    assert slope[1].tolist() == pytest.approx([0.1, -0.1], abs=1e-15), "A = −1 times ∇ log p(y)"
    above = Objective(token_clip=1.0, **K1).from_sampled(torch.tensor([-5.0]), torch.tensor([-1.0]))
    assert above[0].item() == pytest.approx(-1.0) and above[1].item() == 1.0


def test_the_bound_is_on_the_whole_return():
    sampled = SampledTarget(teacher_logp=STUDENT.log()[:, 0] - torch.tensor([0.8, 0.8, 0.0], dtype=torch.float64))
    made = Objective(token_clip=1.0, discount=1.0, **K1)
    loss, clamped = made.per_token_loss(
        STUDENT.log(), sampled, torch.zeros(3, dtype=torch.long), sequence_index=torch.zeros(3, dtype=torch.long)
    )
    assert loss.tolist() == pytest.approx([1.0, 0.8, 0.0], abs=1e-15) and clamped.tolist() == [1.0, 0.0, 0.0]


def test_a_top_k_is_bounded_like_the_whole():
    whole, _, _ = losses(1.0)
    on_k, clamped, slope = losses(1.0, support="student_top_k", top_k=2)
    torch.testing.assert_close(on_k[:2], whole[:2], rtol=1e-6, atol=1e-12)
    assert clamped[1] == 1.0 and (slope[1] == 0).all()


def test_the_factor_t2_comes_after_the_bound():
    t2 = {"student_temperature": 2.0, "teacher_temperature": 2.0, "scale_by_t2": True}
    assert losses(0.1, **t2)[0][1].item() == pytest.approx(0.4, abs=1e-15)


@pytest.mark.parametrize("clip", [0.0, -1.0])
def test_a_bound_that_leaves_nothing_is_refused(clip):
    with pytest.raises(ObjectiveError, match="leaves no token a gradient; use None"):
        Objective(token_clip=clip)


BIAS = [(0.5, 0.591), (1.0, 0.346), (2.0, 0.0008)]  # (bound, relative error) as the README says


@pytest.mark.parametrize(("clip", "error"), BIAS)
def test_bounded_advantages_are_biased_as_far_as_the_readme_says(clip, error):
    logits, teacher = tail_problem()
    exact = gradient(lambda z: reverse_kl(to_logp(z), teacher), logits)[0]
    rows = logits.expand(50, 50).clone().requires_grad_()
    made = Objective(token_clip=clip, **K1)
    loss, _ = made.per_token_loss(rows, DenseTarget(logits=teacher.expand(50, 50)), torch.arange(50))
    mean = expected(torch.autograd.grad(loss.sum(), rows)[0], logits.softmax(-1)[0])
    assert relative_error(mean, exact) == pytest.approx(error, rel=0.06)


# --- the fused losses -------------------------------------------------------------------------------------------------

N, H, V = 13, 5, 29
GENERATOR = torch.Generator().manual_seed(0)
HIDDEN, WEIGHT, OTHER, TAUGHT = (
    torch.randn(*shape, generator=GENERATOR, dtype=torch.float64) for shape in ((N, H), (V, H), (N, H), (V, H))
)
IDS, WEIGHTS = torch.randint(V, (N,), generator=GENERATOR), torch.rand(N, generator=GENERATOR, dtype=torch.float64)
SEQUENCES = torch.tensor([0] * 6 + [1] * 7)
POLICY = PolicyTerm(advantages=torch.randn(N, generator=GENERATOR, dtype=torch.float64), weight=0.5)


def targets() -> dict[str, Any]:
    logits = OTHER @ TAUGHT.T
    logits[3, 0] = -torch.inf  # a token whose reverse KL is infinite
    best = logits.log_softmax(-1).topk(4, dim=-1)
    drawn = logits.log_softmax(-1).gather(-1, IDS[:, None])[:, 0]
    return {
        "hidden": HiddenTarget(hidden=OTHER, head=Head(weight=TAUGHT)),
        "dense": DenseTarget(logits=logits),
        "top_k": TopKTarget(ids=best.indices, teacher_logp=best.values, sampled_logp=drawn),
        "sampled": SampledTarget(teacher_logp=drawn),
    }


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("hidden", {}, {}),
    ("hidden", {"divergence": "forward_kl"}, {"chunk_tokens": 4}),
    ("hidden", {"divergence": "generalized_jsd", "student_temperature": 1.3}, {"distill_weight": 0.7}),
    ("hidden", {"divergence": "forward_reverse_kl"}, {}),
    ("dense", {}, {}),
    ("dense", {"divergence": "total_variation"}, {}),
    ("hidden", {}, {"policy": POLICY}),
    ("top_k", {"support": "teacher_top_k", "top_k": 3}, {"policy": POLICY}),
    ("top_k", {"support": "teacher_top_k", "top_k": 3}, {"memory": "minimal"}),
    ("sampled", {"support": "sampled", "estimator": "k2"}, {}),
    ("sampled", K1, {}),
    ("hidden", {**K1, "discount": 0.5}, {}),
    ("hidden", {**K1, "discount": 0.5, "baseline": "value"}, {}),
]


@pytest.mark.parametrize(("kind", "settings", "more"), CASES, ids=str)
def test_every_fused_loss_is_bounded_as_the_definition_is(kind, settings, more):
    """Below and above the bound; no value nor gradient may differ from whole logits through autograd."""
    target, found = targets()[kind], []
    plain = DenseTarget(logits=OTHER @ TAUGHT.T) if kind == "hidden" else target
    every = Objective(**settings).per_token_loss(HIDDEN @ WEIGHT.T, plain, IDS, sequence_index=SEQUENCES)[0].abs()
    made = Objective(token_clip=1.001 * float(every.median()), **settings)
    for fused in (True, False):
        hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
        policy = {"policy": more["policy"]} if "policy" in more else {}
        if fused:
            total, loss, metrics = linear_objective(
                hidden, weight, target, IDS, made, token_weights=WEIGHTS, sequence_index=SEQUENCES, **more
            )
        else:
            share = {"distill_weight": more["distill_weight"]} if "distill_weight" in more else {}
            loss, metrics = objective_from_logits(
                hidden @ weight.T, plain, IDS, made, sequence_index=SEQUENCES, **policy, **share
            )
            total = (loss * WEIGHTS).sum()
        slopes = torch.autograd.grad(total, [hidden, weight])
        found.append((loss.detach(), metrics["clamped"].double(), *slopes))
    assert 0 < float(found[0][1].sum()) < N, "some tokens are bounded, and some are not"
    for fused_one, plain_one in zip(*found, strict=True):
        torch.testing.assert_close(fused_one, plain_one, rtol=0, atol=1e-11)


def test_blocks_of_the_vocabulary_refuse_a_bound_and_their_advice_works():
    made, given = Objective(token_clip=1.0), (HIDDEN, WEIGHT, targets()["hidden"], IDS)
    with pytest.raises(ObjectiveError, match=r"memory='minimal' takes no token_clip.*use memory='fast'"):
        linear_objective(*given, made, token_weights=WEIGHTS, memory="minimal")
    assert linear_objective(*given, made, token_weights=WEIGHTS, memory="fast")[0].isfinite()

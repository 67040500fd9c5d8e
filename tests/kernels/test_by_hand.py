"""Two-token vocabularies whose losses and gradients fit on a napkin, in every implementation."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import WAYS
from torch import Tensor

from opd.kernels import LinearLoss, PolicyTerm, TeacherMixture, linear_divergence
from opd.types import DenseTarget, Head, HiddenTarget, SampledTarget, TopKTarget

LN = math.log
FAIR, QUARTER = [0.5, 0.5], [0.25, 0.75]  # student, teacher
REVERSE, FORWARD = 0.5 * LN(4 / 3), 0.25 * LN(1 / 2) + 0.75 * LN(3 / 2)

every_way = pytest.mark.parametrize("way", WAYS)
whole_rows = pytest.mark.parametrize("way", [way for way in WAYS if way != "minimal"])


def logs(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


class Coin:
    """A student whose logits are its weight: one token, one feature of value 1."""

    def __init__(self, p: list[float] = FAIR) -> None:
        self.hidden = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
        self.weight = logs(p).T.clone().requires_grad_()

    def loss(self, target, way: str, **settings) -> LinearLoss:
        out = linear_divergence(self.hidden, self.weight, target, **WAYS[way], **settings)
        out.loss.backward()
        return out

    @property
    def slopes(self) -> list[float]:
        """d(loss)/d(logits), which the feature 1 hands on to the weight."""
        assert self.weight.grad is not None
        return self.weight.grad.flatten().tolist()


def dense(q: list[float] = QUARTER) -> DenseTarget:
    return DenseTarget(logits=logs(q))


@every_way
def test_reverse_kl_of_a_fair_coin_from_a_quarter_coin(way):
    coin = Coin()
    out = coin.loss(dense(), way)
    assert out.loss.item() == pytest.approx(REVERSE, abs=1e-15)
    assert coin.slopes == pytest.approx([LN(3) / 4, -LN(3) / 4], abs=1e-15)
    assert coin.hidden.grad.item() == pytest.approx(0, abs=1e-15)  # both weights are log ½
    assert out.student_entropy.item() == pytest.approx(LN(2), abs=1e-15)
    assert out.teacher_entropy.item() == pytest.approx(LN(4) - 0.75 * LN(3), abs=1e-15)


@every_way
def test_the_gradient_of_forward_kl_is_student_minus_teacher(way):
    coin = Coin()
    assert coin.loss(dense(), way, divergence="forward_kl").loss.item() == pytest.approx(FORWARD, abs=1e-15)
    assert coin.slopes == pytest.approx([0.25, -0.25], abs=1e-15)


@every_way
def test_the_gradient_of_the_hidden_state_is_that_of_the_logits_through_the_weight(way):
    coin = Coin([0.2, 0.8])
    coin.loss(dense(), way, divergence="forward_kl")
    assert coin.slopes == pytest.approx([-0.05, 0.05], abs=1e-15)
    assert coin.hidden.grad.item() == pytest.approx(0.05 * LN(4), abs=1e-15)


@every_way
def test_mixture_divergences_by_hand(way):
    # beta = 1/4: M = (7/16, 9/16)
    student_to_m, teacher_to_m = 0.5 * LN(8 / 7) + 0.5 * LN(8 / 9), 0.25 * LN(4 / 7) + 0.75 * LN(4 / 3)
    wanted = {
        "skew_reverse_kl": student_to_m,
        "skew_forward_kl": teacher_to_m,
        "generalized_jsd": teacher_to_m / 0.75 + student_to_m / 0.25,
    }
    for name, value in wanted.items():
        assert Coin().loss(dense(), way, divergence=name, beta=0.25).loss.item() == pytest.approx(value, abs=1e-14)
    published = Coin().loss(dense(), way, divergence="generalized_jsd", beta=0.25, normalize=False).loss.item()
    assert published == pytest.approx(0.25 * teacher_to_m + 0.75 * student_to_m, abs=1e-14)


@every_way
def test_skewed_slopes_by_hand(way):
    # ∂/∂p KL(S‖M) is log(p/m) + 1 − (1−β) p/m, and ∂/∂p KL(T‖M) is −(1−β) q/m; each times p (1−p) between the two logits
    coin = Coin()
    coin.loss(dense(), way, divergence="skew_reverse_kl", beta=0.25)
    rise = LN(8 / 7) - LN(8 / 9) - 0.75 * (8 / 7 - 8 / 9)
    assert coin.slopes == pytest.approx([0.25 * rise, -0.25 * rise], abs=1e-15)
    coin = Coin()
    coin.loss(dense(), way, divergence="skew_forward_kl", beta=0.25)
    rise = -0.75 * (4 / 7 - 4 / 3)
    assert coin.slopes == pytest.approx([0.25 * rise, -0.25 * rise], abs=1e-15)


@whole_rows
def test_total_variation_is_the_mass_that_has_to_move(way):
    coin = Coin([0.4, 0.6])
    assert coin.loss(dense(), way, divergence="total_variation").loss.item() == pytest.approx(0.15, abs=1e-15)
    assert coin.slopes == pytest.approx([0.24, -0.24], abs=1e-15)


@every_way
def test_temperature_divides_the_logits_and_the_gradient(way):
    coin = Coin([0.2, 0.8])  # at temperature 2 the odds are 1 : 2
    out = coin.loss(dense(), way, divergence="forward_kl", student_temperature=2.0, response_ids=torch.tensor([1]))
    assert out.student_logp.item() == pytest.approx(LN(2 / 3), abs=1e-15)
    assert coin.slopes == pytest.approx([(1 / 3 - 0.25) / 2, -(1 / 3 - 0.25) / 2], abs=1e-15)
    coin = Coin([0.2, 0.8])  # the teacher's odds become 1 : √3
    coin.loss(dense(), way, divergence="forward_kl", teacher_temperature=2.0)
    assert coin.slopes == pytest.approx([0.2 - 1 / (1 + 3**0.5), 1 / (1 + 3**0.5) - 0.2], abs=1e-15)


@every_way
def test_a_teacher_by_its_hidden_states_is_its_logits(way):
    head = Head(weight=logs(QUARTER).T - 1.0, bias=torch.tensor([0.5, 0.5], dtype=torch.float64))
    coin = Coin()
    out = coin.loss(HiddenTarget(hidden=torch.ones(1, 1, dtype=torch.float64), head=head), way)
    assert out.loss.item() == pytest.approx(REVERSE, abs=1e-15)
    assert coin.slopes == pytest.approx([LN(3) / 4, -LN(3) / 4], abs=1e-15)


@whole_rows
def test_two_teachers_by_hand(way):
    other = [0.75, 0.25]

    def loss(mixture: str, weights: list[float], **settings) -> tuple[float, list[float]]:
        target = TeacherMixture(
            targets=(dense(), dense(other)),
            weights=torch.tensor(weights, dtype=torch.float64),
            mixture=mixture,  # pyright: ignore[reportArgumentType]
        )
        coin = Coin([0.2, 0.8])
        return coin.loss(target, way, divergence="forward_kl").loss.item(), coin.slopes

    for mixture in ("probability", "logit"):  # half of each is fair in both
        value, slopes = loss(mixture, [0.5, 0.5])
        assert value == pytest.approx(0.5 * LN(2.5) + 0.5 * LN(0.625), abs=1e-14)
        assert slopes == pytest.approx([-0.3, 0.3], abs=1e-15)
    assert loss("probability", [0.1, 0.9])[1] == pytest.approx([0.2 - 0.7, 0.5], abs=1e-15)
    odds = 3**0.8  # (1/3)^0.1 · 3^0.9
    assert loss("logit", [0.1, 0.9])[1] == pytest.approx([0.2 - odds / (1 + odds), odds / (1 + odds) - 0.2], abs=1e-15)
    first, second = (0.25 * LN(1.25) + 0.75 * LN(0.9375)), (0.75 * LN(3.75) + 0.25 * LN(0.3125))
    value, slopes = loss("loss", [0.1, 0.9])
    assert value == pytest.approx(0.1 * first + 0.9 * second, abs=1e-14)
    assert slopes == pytest.approx([0.2 - 0.7, 0.5], abs=1e-15)


@every_way
def test_top_1_of_three_with_a_bucket_is_a_coin(way):
    student = torch.tensor([[0.5], [0.3], [0.2]], dtype=torch.float64).log().requires_grad_()
    hidden = torch.ones(1, 1, dtype=torch.float64)
    target = TopKTarget(ids=torch.tensor([[1]]), teacher_logp=logs([0.75]))
    out = linear_divergence(hidden, student, target, **WAYS[way])
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.3 * LN(0.4) + 0.7 * LN(2.8), abs=1e-15)
    slope = 0.3 * 0.7 * (LN(0.4) - LN(2.8))  # of token 1; the others share the negative by their probability
    assert student.grad.flatten().tolist() == pytest.approx([-slope * 5 / 7, slope, -slope * 2 / 7], abs=1e-15)


@every_way
def test_the_response_token_alone_by_hand(way):
    target, y = SampledTarget(teacher_logp=logs([0.75])[0]), torch.tensor([1])
    delta = LN(0.8 / 0.75)
    for estimator, value, slope in (
        ("k1", delta, delta),  # −A with A = −δ, and −A ∇ log p(y)
        ("k2", delta**2 / 2, delta),
        ("k3", 0.75 / 0.8 - 1 + delta, 1 - 0.75 / 0.8),
    ):
        coin = Coin([0.2, 0.8])
        divergence = "forward_kl" if estimator == "k3" else "reverse_kl"
        out = coin.loss(target, way, estimator=estimator, response_ids=y, divergence=divergence)
        assert out.loss.item() == pytest.approx(value, abs=1e-15)
        assert coin.slopes == pytest.approx([-0.2 * slope, 0.2 * slope], abs=1e-15)  # ∇ log p(1) = (−0.2, 0.2)


@every_way
def test_the_policy_term_by_hand(way):
    y, advantages = torch.tensor([1]), torch.tensor([2.0], dtype=torch.float64)
    for old, ratio, clipped in ((0.8, 1.0, 0.0), (0.5, 1.6, 1.0), (0.64, 1.25, 0.0)):
        term = PolicyTerm(advantages=advantages, old_log_prob=logs([old])[0], clip_range=(0.2, 0.3), weight=0.5)
        coin = Coin([0.2, 0.8])
        out = coin.loss(None, way, policy=term, response_ids=y)
        capped = min(ratio, 1.3)
        assert out.loss.item() == out.policy_loss.item() == pytest.approx(-capped, abs=1e-14)
        assert out.clipped.item() == clipped
        slope = 0.0 if clipped else ratio  # −½ · 2 · r ∇ log p(1)
        assert coin.slopes == pytest.approx([0.2 * slope, -0.2 * slope], abs=1e-14)


@every_way
def test_an_entropy_bonus_pulls_towards_the_fair_coin(way):
    coin = Coin([0.2, 0.8])
    entropy = -0.2 * LN(0.2) - 0.8 * LN(0.8)
    out = coin.loss(None, way, entropy_bonus=0.5)
    assert out.loss.item() == pytest.approx(-0.5 * entropy, abs=1e-15)
    pull = 0.5 * 0.2 * (LN(0.2) + entropy)  # c p (log p + H) is negative: descent raises the rarer side
    assert coin.slopes == pytest.approx([pull, -pull], abs=1e-15)
    assert pull < 0


@every_way
def test_token_weights_multiply_losses_and_gradients(way):
    hidden = torch.ones(3, 1, dtype=torch.float64, requires_grad=True)
    weight = logs([0.2, 0.8]).T.clone().requires_grad_()
    target = DenseTarget(logits=logs(QUARTER, FAIR, [0.9, 0.1]))
    weights = torch.tensor([0.25, 0.5, 0.0], dtype=torch.float64)
    out = linear_divergence(hidden, weight, target, divergence="forward_kl", token_weights=weights, **WAYS[way])
    out.loss.backward()
    per_token = [0.25 * LN(1.25) + 0.75 * LN(0.9375), 0.5 * LN(2.5) + 0.5 * LN(0.625), 0.0]
    assert out.per_token.tolist() == pytest.approx(per_token, abs=1e-15)
    assert out.loss.item() == pytest.approx(0.25 * per_token[0] + 0.5 * per_token[1], abs=1e-15)
    slope = 0.25 * (0.2 - 0.25) + 0.5 * (0.2 - 0.5)
    assert weight.grad.flatten().tolist() == pytest.approx([slope, -slope], abs=1e-15)
    assert hidden.grad.flatten().tolist() == pytest.approx([0.25 * 0.05 * LN(4), 0.5 * 0.3 * LN(4), 0.0], abs=1e-15)

import math

import pytest
import torch
from loss_oracles import expected, gradient, random_logits, relative_error, sampled_gradients, total_variance

from opd.errors import ObjectiveError
from opd.losses import (
    discounted_return,
    distillation_advantage,
    forward_kl,
    gather_logp,
    k1,
    k2,
    k3,
    policy_gradient_loss,
    reverse_kl,
    to_logp,
    value_baseline,
)

V = 50
STUDENT, TEACHER = random_logits(1, V, seed=41), to_logp(random_logits(1, V, seed=42))


def one_token(estimator):
    """The loss that each drawn token causes when `estimator(student_logp, teacher_logp)` is the loss."""
    return lambda logp, drawn: estimator(gather_logp(logp, drawn), TEACHER[0, drawn])


def as_advantage(advantage):
    """The same when `advantage(student_logp, teacher_logp)` weighs the drawn token's log-probability."""
    return one_token(lambda s, t: policy_gradient_loss(s, advantage(s, t).detach()))


def expected_gradient(loss):
    return expected(*sampled_gradients(loss, STUDENT[0]))


REVERSE = gradient(lambda s: reverse_kl(to_logp(s), TEACHER), STUDENT)[0]
FORWARD = gradient(lambda s: forward_kl(to_logp(s), TEACHER), STUDENT)[0]


# --- numbers a pencil can check: p(y) = 1/2, q(y) = 1/8 --------------------------------------------------------------

HALF, EIGHTH = torch.tensor([0.5]).log(), torch.tensor([0.125]).log()


def test_values_of_the_three_estimators_by_hand():
    assert k1(HALF, EIGHTH).item() == pytest.approx(math.log(4))
    assert k2(HALF, EIGHTH).item() == pytest.approx(math.log(4) ** 2 / 2)
    assert k3(HALF, EIGHTH).item() == pytest.approx(1 / 4 - 1 + math.log(4))
    assert k3(EIGHTH, HALF).item() == pytest.approx(4 - 1 - math.log(4), rel=1e-6)
    assert distillation_advantage(HALF, EIGHTH).item() == pytest.approx(-math.log(4))


def test_k3_is_accurate_when_the_two_nearly_agree():
    s = -torch.linspace(0.1, 0.9, 50)
    t = s + 3e-4
    delta = s.double() - t.double()
    torch.testing.assert_close(k3(s, t).double(), delta**2 / 2, rtol=2e-3, atol=0)


def test_advantage_and_baseline_carry_no_gradient():
    s = HALF.clone().requires_grad_()
    assert not distillation_advantage(s, EIGHTH).requires_grad
    assert not value_baseline(s).requires_grad


# --- expected values and gradients, by enumeration of every token -----------------------------------------------------


def test_k1_and_k3_have_reverse_kl_as_expected_value_and_k2_does_not():
    s = to_logp(STUDENT)[0]
    p, wanted = s.exp(), reverse_kl(to_logp(STUDENT), TEACHER).item()
    assert (p * k1(s, TEACHER[0])).sum().item() == pytest.approx(wanted, rel=1e-12)
    assert (p * k3(s, TEACHER[0])).sum().item() == pytest.approx(wanted, rel=1e-12)
    assert (p * k2(s, TEACHER[0])).sum().item() != pytest.approx(wanted, rel=0.1)


def test_k1_as_a_loss_has_expected_gradient_0():
    assert expected_gradient(one_token(k1)).norm() < 1e-14 * REVERSE.norm()


def test_k2_as_a_loss_has_the_gradient_of_reverse_kl():
    assert relative_error(expected_gradient(one_token(k2)), REVERSE) < 1e-12


def test_k3_as_a_loss_has_the_gradient_of_forward_kl_not_of_reverse_kl():
    found = expected_gradient(one_token(k3))
    assert relative_error(found, FORWARD) < 1e-12
    assert relative_error(found, REVERSE) > 0.1


def test_minus_k1_as_an_advantage_has_the_gradient_of_reverse_kl():
    assert relative_error(expected_gradient(as_advantage(distillation_advantage)), REVERSE) < 1e-12


def test_minus_k3_as_an_advantage_points_in_a_wrong_direction():
    found = expected_gradient(as_advantage(lambda s, t: -k3(s, t)))
    assert relative_error(found, REVERSE) > 1
    assert torch.nn.functional.cosine_similarity(found, REVERSE, dim=0) < 0.5


def test_a_per_position_kl_as_an_advantage_has_expected_gradient_0_and_variance():
    loss = as_advantage(lambda s, t: -reverse_kl(to_logp(STUDENT), TEACHER).expand(V))
    per_draw, probability = sampled_gradients(loss, STUDENT[0])
    assert expected(per_draw, probability).norm() < 1e-14
    assert total_variance(per_draw, probability) > 0.1


def test_value_baseline_keeps_the_mean_and_lowers_the_variance():
    kl = reverse_kl(to_logp(STUDENT), TEACHER)

    def with_baseline(s, t):
        return distillation_advantage(s, t) - value_baseline(kl)

    plain = sampled_gradients(as_advantage(distillation_advantage), STUDENT[0])
    based = sampled_gradients(as_advantage(with_baseline), STUDENT[0])
    assert relative_error(expected(*based), REVERSE) < 1e-12
    assert total_variance(*based) < 0.9 * total_variance(*plain)


def test_the_expected_baselined_advantage_is_0():
    s = to_logp(STUDENT)
    advantage = distillation_advantage(s[0], TEACHER[0]) - value_baseline(reverse_kl(s, TEACHER))
    assert (s[0].exp() * advantage).sum().abs() < 1e-13


def test_policy_gradient_corrects_for_another_sampling_distribution():
    sampler = to_logp(random_logits(1, V, seed=43))[0]

    def loss(logp, drawn):
        s = gather_logp(logp, drawn)
        return policy_gradient_loss(s, distillation_advantage(s, TEACHER[0, drawn]), sampler[drawn])

    per_draw, _ = sampled_gradients(loss, STUDENT[0])
    assert relative_error(expected(per_draw, sampler.exp()), REVERSE) < 1e-12


# --- policy gradient --------------------------------------------------------------------------------------------------


def test_policy_gradient_is_the_ratio_times_minus_the_advantage():
    loss = policy_gradient_loss(HALF, torch.tensor([3.0]), torch.tensor([0.25]).log())
    assert loss.item() == pytest.approx(-6.0)
    assert policy_gradient_loss(HALF, torch.tensor([3.0])).item() == -3.0


def test_clipping_takes_the_worse_of_the_clipped_and_the_raw_ratio():
    student = torch.tensor([0.5, 0.5, 0.25, 0.25]).log()
    sampler = torch.tensor([0.25, 0.25, 0.5, 0.5]).log()  # ratios 2, 2, 1/2, 1/2
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert policy_gradient_loss(student, advantage, sampler, 0.2).tolist() == pytest.approx([-1.2, 2.0, -0.5, 0.8])


def test_a_clipped_token_has_no_gradient():
    student = torch.tensor([0.5, 0.5]).log().requires_grad_()
    sampler = torch.tensor([0.25, 0.25]).log()
    loss = policy_gradient_loss(student, torch.tensor([1.0, -1.0]), sampler, 0.2)
    assert torch.autograd.grad(loss.sum(), student)[0].tolist() == pytest.approx([0.0, 2.0])


def test_an_enormous_ratio_stays_finite():
    loss = policy_gradient_loss(torch.tensor([-1.0]), torch.tensor([1.0]), torch.tensor([-200.0]))
    assert loss.item() == pytest.approx(-math.exp(20))


def test_the_advantage_is_detached():
    s = torch.tensor([0.5]).log().requires_grad_()
    loss = policy_gradient_loss(s, 2 * s)
    assert torch.autograd.grad(loss.sum(), s)[0].item() == pytest.approx(-2 * math.log(0.5))


@pytest.mark.parametrize("clip", [0.0, -0.2, math.nan, math.inf])
def test_an_impossible_clip_range_is_refused(clip):
    with pytest.raises(ObjectiveError, match="clip_range"):
        policy_gradient_loss(HALF, HALF, None, clip)


# --- returns ----------------------------------------------------------------------------------------------------------


def test_returns_by_hand_stay_within_each_sequence():
    advantage = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    sequence = torch.tensor([0, 0, 0, 1, 2])
    assert discounted_return(advantage, sequence, 0.5).tolist() == [3.0, 4.0, 4.0, 8.0, 16.0]
    assert discounted_return(advantage, sequence, 1.0).tolist() == [7.0, 6.0, 4.0, 8.0, 16.0]
    assert discounted_return(advantage, sequence, 0.0).tolist() == advantage.tolist()


def test_returns_equal_the_recursion_on_ragged_sequences():
    lengths = [1, 7, 2, 33, 1, 16, 5]
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    advantage = random_logits(len(sequence), seed=44)
    wanted, following = advantage.clone(), None
    for t in reversed(range(len(sequence))):
        if following == sequence[t]:
            wanted[t] += 0.9 * wanted[t + 1]
        following = sequence[t]
    torch.testing.assert_close(discounted_return(advantage, sequence, 0.9), wanted, rtol=1e-12, atol=1e-13)


def test_no_tokens_have_no_returns():
    assert discounted_return(torch.zeros(0), torch.zeros(0, dtype=torch.long), 1.0).tolist() == []


def test_an_infinite_advantage_does_not_reach_other_sequences():
    advantage = torch.tensor([1.0, -math.inf, 2.0])
    assert discounted_return(advantage, torch.tensor([0, 1, 1]), 0.5).tolist() == [1.0, -math.inf, 2.0]


@pytest.mark.parametrize("discount", [-0.1, 1.1, math.nan])
def test_an_impossible_discount_is_refused(discount):
    with pytest.raises(ObjectiveError, match="discount"):
        discounted_return(torch.zeros(2), torch.zeros(2, dtype=torch.long), discount)


def test_discount_1_is_the_sequence_level_reverse_kl_with_and_without_baseline():
    """Two steps, V=3, every sequence enumerated: tables of logits for step 1 [V] and, after each token, step 2 [V, V]."""
    first, second = random_logits(1, 3, seed=45), random_logits(3, 3, seed=46)
    first_teacher, second_teacher = to_logp(random_logits(1, 3, seed=47)), to_logp(random_logits(3, 3, seed=48))

    def tables(leaf):
        return to_logp(leaf[:1]), to_logp(leaf[1:])

    def sequence_kl(leaf):
        s1, s2 = tables(leaf)
        joint = s1.T + s2
        return (joint.exp() * (joint - first_teacher.T - second_teacher)).sum()

    def loss(leaf, baseline):
        s1, s2 = tables(leaf)
        total = 0.0
        for a in range(3):
            for b in range(3):
                student = torch.stack([s1[0, a], s2[a, b]])
                teacher = torch.stack([first_teacher[0, a], second_teacher[a, b]])
                returns = discounted_return(
                    distillation_advantage(student, teacher), torch.zeros(2, dtype=torch.long), 1.0
                )
                if baseline:
                    kl = torch.cat(
                        [reverse_kl(s1, first_teacher), reverse_kl(s2[a : a + 1], second_teacher[a : a + 1])]
                    )
                    returns = returns - value_baseline(kl)
                total = total + student.sum().exp().detach() * policy_gradient_loss(student, returns).sum()
        return total

    leaf = torch.cat([first, second])
    wanted = gradient(sequence_kl, leaf)
    for baseline in (False, True):
        assert relative_error(gradient(lambda x, b=baseline: loss(x, b), leaf), wanted) < 1e-12

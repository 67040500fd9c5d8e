import math

import pytest
import torch
from loss_oracles import gradient, random_logits

from opd.errors import ObjectiveError
from opd.losses import mix_losses, mix_teachers, reverse_kl, route, to_logp

A, B = torch.tensor([[0.9, 0.1]]).double().log(), torch.tensor([[0.1, 0.9]]).double().log()
EVEN = torch.tensor([0.5, 0.5])


def test_probability_mixture_averages_probabilities():
    mixed = mix_teachers([A, B], torch.tensor([0.75, 0.25])).exp()
    assert mixed[0].tolist() == pytest.approx([0.7, 0.3])


def test_logit_mixture_is_the_renormalised_geometric_mean():
    mixed = mix_teachers([A, B], torch.tensor([0.75, 0.25]), "logit").exp()
    odds = 9**0.75 / 9**0.25
    assert mixed[0].tolist() == pytest.approx([odds / (1 + odds), 1 / (1 + odds)])


@pytest.mark.parametrize("mixture", ["probability", "logit"])
def test_a_mixture_is_a_distribution_and_one_teacher_is_itself(mixture):
    teachers = [to_logp(random_logits(4, 11, seed=seed)) for seed in (1, 2, 3)]
    mixed = mix_teachers(teachers, torch.tensor([0.2, 0.5, 0.3]), mixture)
    assert mixed.exp().sum(-1).tolist() == pytest.approx([1.0] * 4)
    alone = mix_teachers(teachers, torch.tensor([0.0, 1.0, 0.0]), mixture)
    torch.testing.assert_close(alone, teachers[1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("mixture", ["probability", "logit"])
def test_weights_may_differ_per_token(mixture):
    teachers = [to_logp(random_logits(2, 5, seed=seed)) for seed in (1, 2)]
    mixed = mix_teachers(teachers, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), mixture)
    torch.testing.assert_close(mixed, torch.stack([teachers[0][0], teachers[1][1]]), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("mixture", ["probability", "logit"])
def test_impossible_tokens_never_make_nan(mixture):
    certain, fair = torch.tensor([[0.0, -math.inf, -math.inf]]), torch.tensor([[0.5, 0.5, 0.0]]).log()
    half = mix_teachers([certain, fair], EVEN, mixture)
    wanted = [0.75, 0.25, 0.0] if mixture == "probability" else [1.0, 0.0, 0.0]
    assert half.exp()[0].tolist() == pytest.approx(wanted)
    only_fair = mix_teachers([certain, fair], torch.tensor([0.0, 1.0]), mixture)
    assert only_fair.exp()[0].tolist() == pytest.approx([0.5, 0.5, 0.0])


def test_a_logit_mixture_of_teachers_that_exclude_each_other_is_refused():
    left, right = torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]])
    with pytest.raises(ObjectiveError, match="mixture='probability'"):
        mix_teachers([left, right], EVEN, "logit")


def test_route_gives_every_token_its_own_teacher():
    teachers = [torch.full((3, 2), float(i)) for i in range(3)]
    assert route(teachers, torch.tensor([2, 0, 1]))[:, 0].tolist() == [2.0, 0.0, 1.0]


def test_mixed_losses_are_the_weighted_sum_and_so_are_their_gradients():
    student, teachers = random_logits(3, 7, seed=5), [to_logp(random_logits(3, 7, seed=s)) for s in (6, 7)]
    weights = torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]]).double()

    def mixed(s):
        return mix_losses([reverse_kl(to_logp(s), t) for t in teachers], weights)

    parts = [gradient(lambda s, t=t: reverse_kl(to_logp(s), t), student) for t in teachers]
    wanted = weights[:, :1] * parts[0] + weights[:, 1:] * parts[1]
    torch.testing.assert_close(gradient(mixed, student), wanted, rtol=1e-12, atol=1e-15)
    assert mix_losses([torch.tensor([1.0]), torch.tensor([3.0])], torch.tensor([0.25, 0.75])).item() == 2.5


def test_a_teacher_of_weight_0_cannot_spoil_the_loss():
    assert mix_losses([torch.tensor([2.0]), torch.tensor([math.inf])], torch.tensor([1.0, 0.0])).item() == 2.0


@pytest.mark.parametrize("weights", [[0.5, 0.6], [1.5, -0.5], [1.0], [math.nan, 1.0]])
def test_weights_that_are_not_a_distribution_are_refused(weights):
    for mix in (mix_teachers, mix_losses):
        with pytest.raises(ObjectiveError, match="weight"):
            mix([A, B] if mix is mix_teachers else [A[:, 0], B[:, 0]], torch.tensor(weights))


def test_unknown_mixtures_and_routes_are_refused():
    with pytest.raises(ObjectiveError, match="mix_losses"):
        mix_teachers([A, B], EVEN, "loss")
    with pytest.raises(ObjectiveError, match=r"0\.\.1"):
        route([A, B], torch.tensor([2]))
    with pytest.raises(ObjectiveError, match=r"0\.\.1"):
        route([A, B], torch.tensor([-1]))
    with pytest.raises(ObjectiveError, match="at least one"):
        route([], torch.tensor([0]))

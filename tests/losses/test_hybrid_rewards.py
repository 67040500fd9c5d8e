import math

import pytest
import torch
from loss_oracles import random_logits

from opd.errors import ObjectiveError
from opd.losses import (
    Schedule,
    combine_advantages,
    group_relative_advantage,
    leave_one_out_advantage,
    match_scale,
)

GROUPS = torch.tensor([0, 1, 0, 1, 2])


def test_group_relative_advantage_by_hand():
    rewards = torch.tensor([1.0, 0.0, 3.0, 0.0, 7.0])
    assert group_relative_advantage(rewards, GROUPS, normalize_std=False).tolist() == [-1.0, 0.0, 1.0, 0.0, 0.0]
    wanted = 1 / math.sqrt(2)  # deviations −1 and 1 over n − 1 = 1: standard deviation √2
    assert group_relative_advantage(rewards, GROUPS).tolist() == pytest.approx([-wanted, 0, wanted, 0, 0], abs=1e-6)


def test_leave_one_out_advantage_by_hand():
    rewards = torch.tensor([1.0, 0.0, 3.0, 0.0, 7.0])
    assert leave_one_out_advantage(rewards, GROUPS).tolist() == [-2.0, 0.0, 2.0, 0.0, 0.0]
    three = leave_one_out_advantage(torch.tensor([1.0, 2.0, 6.0]), torch.zeros(3, dtype=torch.long))
    assert three.tolist() == pytest.approx([-3.0, -1.5, 4.5])


@pytest.mark.parametrize("count", range(1, 12))
def test_equal_rewards_give_exactly_no_advantage_even_when_their_mean_rounds(count):
    rewards, group = torch.full((count,), 0.1, dtype=torch.float64), torch.zeros(count, dtype=torch.long)
    for found in (
        group_relative_advantage(rewards, group),
        group_relative_advantage(rewards, group, normalize_std=False),
        leave_one_out_advantage(rewards, group),
    ):
        assert (found == 0).all()


def test_a_spread_of_rounding_is_not_scaled_up():
    values = torch.tensor([1e-8, -1e-8])
    assert torch.equal(match_scale(values), values)
    assert torch.equal(match_scale(values, std=1e-8), values)
    assert match_scale(torch.tensor([1e-3, -1e-3])).tolist() == pytest.approx([1.0, -1.0])


def test_group_advantages_ignore_a_shift_and_a_scale_of_the_rewards():
    rewards, group = random_logits(12, seed=1), torch.arange(12) % 3
    moved = group_relative_advantage(5 + 3 * rewards, group)
    torch.testing.assert_close(moved, group_relative_advantage(rewards, group), rtol=1e-5, atol=1e-6)
    assert torch.zeros(3).double().index_add(0, group, moved).abs().max() < 1e-12


def test_no_rewards_have_no_advantages():
    assert group_relative_advantage(torch.zeros(0), torch.zeros(0, dtype=torch.long)).tolist() == []


@pytest.mark.parametrize("scale", ["none", "match"])
def test_a_weight_of_0_leaves_the_other_term_bit_for_bit(scale):
    rl, distill = random_logits(9, seed=2, dtype=torch.float32), random_logits(9, seed=3, dtype=torch.float32)
    broken = torch.full((9,), math.nan)
    assert torch.equal(combine_advantages(broken, distill, rl_weight=0.0, distill_weight=1.0, scale=scale), distill)
    assert torch.equal(combine_advantages(rl, broken, rl_weight=1.0, distill_weight=0.0, scale=scale), rl)


def test_terms_are_weighed_and_added():
    value = combine_advantages(torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0]), rl_weight=3.0, distill_weight=0.5)
    assert value.tolist() == [8.0, 16.0]


def test_match_divides_each_term_by_its_own_spread():
    rl, distill = torch.tensor([0.0, 2.0]), torch.tensor([30.0, 10.0])  # standard deviations 1 and 10
    value = combine_advantages(rl, distill, rl_weight=1.0, distill_weight=1.0, scale="match")
    assert value.tolist() == [3.0, 3.0]
    given = combine_advantages(
        rl, distill, rl_weight=1.0, distill_weight=1.0, scale="match", rl_std=2.0, distill_std=5.0
    )
    assert given.tolist() == [6.0, 3.0]


def test_match_scale_keeps_a_constant_and_an_empty_batch():
    assert match_scale(torch.tensor([3.0, 3.0])).tolist() == [3.0, 3.0]
    assert match_scale(torch.zeros(0)).tolist() == []


def test_the_spread_itself_has_no_gradient():
    values = torch.tensor([0.0, 4.0], requires_grad=True)  # standard deviation 2
    assert torch.autograd.grad(match_scale(values).sum(), values)[0].tolist() == [0.5, 0.5]
    given = values.std(correction=0)
    assert torch.autograd.grad(match_scale(values, given).sum(), values)[0].tolist() == [0.5, 0.5]


def test_schedules_by_hand():
    assert [Schedule(start=0.3).at(step) for step in (0, 5, 500)] == [0.3, 0.3, 0.3]
    falling = Schedule(kind="linear", start=1.0, end=0.0, steps=4)
    assert [falling.at(step) for step in (-1, 0, 1, 2, 4, 9)] == [1.0, 1.0, 0.75, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("wrong", [{"kind": "cosine"}, {"start": math.nan}, {"kind": "linear", "steps": 0}])
def test_impossible_schedules_are_refused(wrong):
    with pytest.raises(ObjectiveError, match="schedule"):
        Schedule(**wrong)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"rl_weight": 0.0, "distill_weight": 0.0}, "both 0"),
        ({"rl_weight": math.nan, "distill_weight": 1.0}, "finite"),
        ({"rl_weight": 1.0, "distill_weight": 1.0, "scale": "std"}, "none, match"),
    ],
)
def test_combinations_that_train_nothing_or_nonsense_are_refused(settings, why):
    with pytest.raises(ObjectiveError, match=why):
        combine_advantages(torch.ones(2), torch.ones(2), **settings)

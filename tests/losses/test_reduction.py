import math

import pytest
import torch
from loss_oracles import random_logits

from opd.errors import ObjectiveError
from opd.losses import reverse_kl, to_logp, token_weights, weighted_sum

SEQUENCES = torch.tensor([0, 0, 0, 1])
LENGTHS = torch.tensor([3, 1])


def test_weights_by_hand():
    assert token_weights(SEQUENCES, LENGTHS, reduction="token_mean", global_count=4).tolist() == [0.25] * 4
    by_sequence = token_weights(SEQUENCES, LENGTHS, reduction="sequence_mean", global_count=2)
    assert by_sequence.tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
    assert token_weights(SEQUENCES, LENGTHS, reduction="fixed", global_count=1000).tolist() == pytest.approx(
        [0.001] * 4
    )


def test_a_sequence_without_a_counted_token_divides_by_nothing():
    mask = torch.tensor([True, True, True, False])
    settings = {"reduction": "sequence_mean", "global_count": 1}
    assert token_weights(SEQUENCES, torch.tensor([3, 0]), mask=mask, **settings).tolist()[3] == 0.0
    assert token_weights(SEQUENCES, torch.tensor([3, 0]), **settings).isfinite().all()


def test_masked_tokens_weigh_nothing():
    mask = torch.tensor([True, False, True, True])
    weights = token_weights(SEQUENCES, torch.tensor([2, 1]), reduction="sequence_mean", global_count=2, mask=mask)
    assert weights.tolist() == [0.25, 0.0, 0.25, 0.5]


def test_the_means_are_means():
    losses = torch.tensor([1.0, 2.0, 3.0, 10.0])
    token_mean = weighted_sum(losses, token_weights(SEQUENCES, LENGTHS, reduction="token_mean", global_count=4))
    sequence_mean = weighted_sum(losses, token_weights(SEQUENCES, LENGTHS, reduction="sequence_mean", global_count=2))
    assert (token_mean.item(), sequence_mean.item()) == (4.0, pytest.approx(6.0))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_token_of_weight_0_cannot_poison_the_sum_or_its_gradient(poison):
    losses = torch.tensor([1.0, poison], requires_grad=True)
    total = weighted_sum(losses, torch.tensor([0.5, 0.0]))
    assert total.item() == 0.5
    assert torch.autograd.grad(total, losses)[0].tolist() == [0.5, 0.0]


def test_a_masked_position_where_the_teacher_is_infinitely_surprised_leaves_no_trace():
    logits = torch.zeros(2, 3, requires_grad=True)
    teacher = to_logp(torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, -math.inf]]))
    total = weighted_sum(reverse_kl(to_logp(logits), teacher), torch.tensor([1.0, 0.0]))
    slope = torch.autograd.grad(total, logits)[0]
    assert total.isfinite()
    assert slope[0].norm() > 0.1
    assert (slope[1] == 0).all()


def test_an_infinite_loss_that_counts_is_not_hidden():
    assert weighted_sum(torch.tensor([1.0, math.inf]), torch.tensor([0.5, 0.5])).item() == math.inf


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "fixed"])
@pytest.mark.parametrize("parts", [1, 2, 8])
def test_any_split_of_the_batch_gives_the_same_loss_and_gradient(reduction, parts):
    """8 sequences as one micro-batch, as 2 ranks of 4, or as 8 of 1."""
    lengths = torch.tensor([3, 1, 9, 2, 7, 1, 5, 12])
    count = {"token_mean": int(lengths.sum()), "sequence_mean": 8, "fixed": 64}[reduction]
    student = random_logits(int(lengths.sum()), 20, seed=1, dtype=torch.float32)
    teacher = to_logp(random_logits(int(lengths.sum()), 20, seed=2, dtype=torch.float32))

    def loss_and_gradient(parts):
        leaf, total = student.clone().requires_grad_(), torch.zeros(())
        start = 0
        for chunk in lengths.chunk(parts):
            rows = slice(start, start + int(chunk.sum()))
            index = torch.repeat_interleave(torch.arange(len(chunk)), chunk)
            weights = token_weights(index, chunk, reduction=reduction, global_count=count)
            total = total + weighted_sum(reverse_kl(to_logp(leaf[rows]), teacher[rows]), weights)
            start = rows.stop
        return total.detach(), torch.autograd.grad(total, leaf)[0]

    whole, split = loss_and_gradient(1), loss_and_gradient(parts)
    torch.testing.assert_close(split[0], whole[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(split[1], whole[1], rtol=1e-6, atol=1e-9)


def test_a_micro_batch_without_tokens_adds_0():
    weights = token_weights(
        torch.zeros(0, dtype=torch.long), torch.tensor([0]), reduction="sequence_mean", global_count=4
    )
    assert weighted_sum(torch.zeros(0), weights).item() == 0.0


def test_weights_have_the_dtype_they_are_asked_for():
    weights = token_weights(SEQUENCES, LENGTHS, reduction="sequence_mean", global_count=3, dtype=torch.float64)
    assert weights.dtype == torch.float64
    assert weights[0].item() == 1 / 3 / 3


@pytest.mark.parametrize("count", [0, -1, math.nan, math.inf])
def test_an_impossible_count_is_refused(count):
    with pytest.raises(ObjectiveError, match="nothing to divide by"):
        token_weights(SEQUENCES, LENGTHS, reduction="token_mean", global_count=count)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ObjectiveError, match="token_mean, sequence_mean, fixed"):
        token_weights(SEQUENCES, LENGTHS, reduction="mean", global_count=1)

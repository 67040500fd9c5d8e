"""A teacher's top-k and logits from its hidden states, a chunk at a time, and the same bits as the student's rows."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import TAILS, World

from opd.errors import ObjectiveError
from opd.kernels import linear_divergence
from opd.kernels.teacher_rows import linear_logits, linear_top_k
from opd.types import Head, SampledTarget

WORLD = World(23, 7, 41)
HEAD = Head(weight=WORLD.weight, bias=WORLD.bias)


def test_the_two_likeliest_of_three_by_hand():
    weight = torch.tensor([[0.2], [0.5], [0.3]], dtype=torch.float64).log()
    found = linear_top_k(torch.ones(1, 1, dtype=torch.float64), Head(weight=weight), torch.tensor([0]), 2)
    assert found.ids.tolist() == [[1, 2]]
    assert found.teacher_logp.exp().flatten().tolist() == pytest.approx([0.5, 0.3])
    assert found.sampled_logp.exp().item() == pytest.approx(0.2)


@pytest.mark.parametrize("chunk", [1, 5, 23, None])
def test_a_top_k_is_that_of_the_whole_logits(chunk):
    ids = WORLD.response_ids % 29
    for valid, masked in ((None, ()), (29, ()), (29, (3, 8))):
        logits = WORLD.logits()[:, :valid]
        logits[:, list(masked)] = -math.inf
        logp = logits.log_softmax(-1)
        head = Head(weight=WORLD.weight, bias=WORLD.bias, valid_vocab=valid)
        for found in (
            linear_top_k(WORLD.hidden_states, head, ids, 6, masked_ids=masked, chunk_tokens=chunk),
            linear_top_k(WORLD.hidden_states, HEAD, ids, 6, valid_vocab=valid, masked_ids=masked, chunk_tokens=chunk),
        ):
            best = logp.topk(6, -1)
            assert torch.equal(found.ids, best.indices)
            torch.testing.assert_close(found.teacher_logp, best.values, rtol=0, atol=1e-12)
            drawn = logp.gather(-1, ids[:, None]).squeeze(-1)
            torch.testing.assert_close(found.sampled_logp, drawn, rtol=0, atol=1e-12)


def test_logits_are_the_product_with_minus_infinity_where_masked():
    wanted = WORLD.logits()[:, :29].index_fill(-1, torch.tensor([3, 8]), -math.inf)
    found = linear_logits(WORLD.hidden_states, HEAD, valid_vocab=29, masked_ids=(3, 8))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("offset", "off_by"), [(0.0, 0.0), (20.0, 0.0), (60.0, 1e-6), (-150.0, 1e-6)])
def test_a_teacher_that_is_the_student_differs_by_exactly_nothing(dtype, offset, off_by):
    """Its top-k and its response tokens are those bits that the student's own rows give: no loss and no gradient.

    Where e^z leaves float32's range, rows take another path than the teacher's, and a rounding is left.
    """
    world = World(23, 7, 41, dtype, offset=offset)
    hidden, weight, bias = (p.to(dtype) for p in (world.hidden_states, world.weight, world.bias))
    teacher = linear_top_k(hidden, Head(weight=weight, bias=bias), world.response_ids, 6, chunk_tokens=5)
    for tail in TAILS:
        leaf = hidden.clone().requires_grad_()
        out = linear_divergence(
            leaf, weight, teacher, bias=bias, tail=tail, response_ids=world.response_ids, chunk_tokens=5
        )
        out.loss.backward()
        assert out.per_token.abs().max() <= off_by
        assert leaf.grad.abs().max() <= 1e-6 + 10 * off_by
    leaf = hidden.clone().requires_grad_()
    target = SampledTarget(teacher_logp=teacher.sampled_logp)
    out = linear_divergence(leaf, weight, target, bias=bias, response_ids=world.response_ids, chunk_tokens=5)
    out.loss.backward()
    assert out.per_token.abs().max() <= 10 * off_by and leaf.grad.abs().max() <= 10 * off_by


def test_an_empty_batch_has_an_empty_top_k():
    found = linear_top_k(WORLD.hidden_states[:0], HEAD, WORLD.response_ids[:0], 3)
    assert found.ids.shape == found.teacher_logp.shape == (0, 3) and found.sampled_logp.shape == (0,)
    assert linear_logits(WORLD.hidden_states[:0], HEAD).shape == (0, 41)


def test_an_id_outside_the_vocabulary_is_refused():
    with pytest.raises(ObjectiveError, match="41 at token 0"):
        linear_top_k(WORLD.hidden_states, HEAD, torch.full((23,), 41), 3)

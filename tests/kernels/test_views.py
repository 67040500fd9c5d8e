"""Both models' views of response tokens, from hidden states and from whole logits, against a softmax in float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opd.kernels import linear_logits, linear_views, views_from_logits
from opd.testing import random_logits, random_target, target_from_logits
from opd.types import DenseTarget, Head, HiddenTarget, ModelView, SampledTarget, TeacherMixture, TopKTarget

TOKENS, HIDDEN, VOCAB = 70, 8, 300
VALID, MASKED = 290, (7, 250)


@pytest.fixture
def head() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight, bias and response ids."""
    seeds = torch.Generator().manual_seed(3)
    hidden, weight, bias = (torch.randn(*shape, generator=seeds) for shape in ((TOKENS, HIDDEN), (VOCAB, HIDDEN), (VOCAB,)))  # fmt: skip
    return hidden, weight, bias, torch.randint(10, 200, (TOKENS,), generator=seeds)


def by_hand(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    logits = hidden.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    logits[:, VALID:] = -torch.inf
    logits[:, MASKED] = -torch.inf
    return logits.log_softmax(-1)


def check(view: ModelView, logp: torch.Tensor, ids: torch.Tensor, k: int = 5) -> None:
    best = logp.exp().topk(k)
    assert view.top_ids is not None and view.top_probabilities is not None
    assert torch.equal(view.top_ids, best.indices)
    torch.testing.assert_close(view.top_probabilities.double(), best.values, rtol=1e-4, atol=1e-7)
    entropy = -torch.where(logp > -torch.inf, logp.exp() * logp, 0.0).sum(-1)
    for own, exact in ((view.logp, logp.gather(-1, ids[:, None])[:, 0]), (view.entropy, entropy)):
        assert own is not None
        torch.testing.assert_close(own.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 16, 64, 1000])
def test_views_from_hidden_states_are_those_of_whole_logits(head, chunk):
    hidden, weight, bias, ids = head
    target = random_target("hidden", TOKENS, VOCAB + 5, seed=1)
    assert isinstance(target, HiddenTarget)
    student, teacher = linear_views(
        hidden, weight, target, ids, bias=bias, valid_vocab=VALID, masked_ids=MASKED, chunk_tokens=chunk
    )
    check(student, by_hand(hidden, weight, bias), ids)
    check(teacher, by_hand(target.hidden, target.head.weight[:VOCAB], None), ids)


def test_views_from_logits_are_those_from_hidden_states(head):
    hidden, weight, bias, ids = head
    target = random_target("hidden", TOKENS, VOCAB, seed=1)
    assert isinstance(target, HiddenTarget)
    common = {"valid_vocab": VALID, "masked_ids": MASKED}
    rows = linear_logits(hidden, Head(weight=weight, bias=bias), **common)
    dense = DenseTarget(logits=linear_logits(target.hidden, target.head, **common))
    student, teacher = views_from_logits(rows, dense, ids)
    check(student, by_hand(hidden, weight, bias), ids)
    check(teacher, by_hand(target.hidden, target.head.weight, None), ids)


def test_temperatures_of_one_teacher_are_taken_out(head):
    hidden, weight, bias, ids = head
    target = random_target("dense", TOKENS, VALID, seed=1)
    for temperature in (1.0, 3.0):
        _, teacher = linear_views(hidden, weight, target, ids, bias=bias, teacher_temperature=temperature)
        assert isinstance(target, DenseTarget)
        check(teacher, target.logits.double().log_softmax(-1), ids)


def test_a_mixture_with_weights_of_each_token_is_mixed_token_by_token(head):
    hidden, weight, _, ids = head
    members = tuple(DenseTarget(logits=random_logits(TOKENS, VOCAB, seed=seed)) for seed in (1, 2))
    weights = torch.rand(TOKENS, 1, generator=torch.Generator().manual_seed(4))
    weights = torch.cat([weights, 1 - weights], dim=-1)
    mixture = TeacherMixture(targets=members, weights=weights)
    _, teacher = linear_views(hidden, weight, mixture, ids, chunk_tokens=16)
    each = torch.stack([member.logits.double().softmax(-1) for member in members], dim=-1)
    check(teacher, (each * weights.double().unsqueeze(1)).sum(-1).log(), ids)


def test_a_repeated_token_of_a_top_k_target_is_shown_once(head):
    hidden, weight, _, ids = head
    named = torch.tensor([[4, 9, 4, 2]]).expand(TOKENS, 4)
    logp = torch.tensor([[0.5, 0.2, 0.5, 0.1]]).log().expand(TOKENS, 4)
    _, teacher = linear_views(hidden, weight, TopKTarget(ids=named, teacher_logp=logp), ids)
    assert teacher.logp is teacher.entropy is None
    assert teacher.top_ids is not None and teacher.top_probabilities is not None
    assert teacher.top_ids[0, :3].tolist() == [4, 9, 2]
    assert teacher.top_probabilities[0].tolist() == pytest.approx([0.5, 0.2, 0.1, 0.0])


def test_targets_that_know_less_tell_less(head):
    hidden, weight, _, ids = head
    logits = random_logits(TOKENS, VOCAB, seed=5)
    sampled = target_from_logits("sampled", logits, ids)
    assert isinstance(sampled, SampledTarget)
    _, teacher = linear_views(hidden, weight, sampled, ids)
    assert teacher.logp is not None and torch.equal(teacher.logp, sampled.teacher_logp)
    assert teacher.top_ids is teacher.entropy is None
    losses = TeacherMixture(targets=(DenseTarget(logits=logits),) * 2, weights=torch.tensor([0.5, 0.5]), mixture="loss")
    assert linear_views(hidden, weight, losses, ids)[1] == ModelView() == linear_views(hidden, weight, None, ids)[1]


def test_a_small_vocabulary_is_shown_whole(head):
    hidden, weight, _, _ = head
    student, _ = linear_views(hidden, weight[:3], None, torch.zeros(TOKENS, dtype=torch.long))
    assert student.top_probabilities is not None and student.top_probabilities.shape == (TOKENS, 3)
    torch.testing.assert_close(student.top_probabilities.sum(-1), torch.ones(TOKENS))


class LargestTensor(TorchDispatchMode):
    """Entries of the largest tensor that any operation returned."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.entries = max([self.entries, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def test_no_more_logits_than_a_chunk_exist(head):
    hidden, weight, bias, ids = head
    target = random_target("hidden", TOKENS, VOCAB, seed=1)
    with LargestTensor() as seen:
        linear_views(hidden, weight, target, ids, bias=bias, chunk_tokens=16)
    assert seen.entries <= 16 * VOCAB
    with LargestTensor() as seen:
        linear_views(hidden, weight, target, ids, bias=bias, chunk_tokens=1000)
    assert seen.entries >= TOKENS * VOCAB, "the check above could not have failed"


def test_nothing_has_a_gradient(head):
    hidden, weight, bias, ids = head
    student, _ = linear_views(hidden.requires_grad_(), weight.requires_grad_(), None, ids, bias=bias)
    assert student.logp is not None and not student.logp.requires_grad

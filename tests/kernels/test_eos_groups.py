"""Ids that mean the same end count as one action: the divergence is that of the added probabilities, and so is its gradient."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from kernel_cases import CLOSED, DIVERGENCES, World, assert_same, named

from opd.errors import ObjectiveError
from opd.kernels import PolicyTerm, TeacherMixture, linear_objective, objective_from_logits
from opd.losses import Objective
from opd.losses.groups import first_of, merge_tokens
from opd.types import DenseTarget, HiddenTarget

GROUPS = ((5, 9, 30), (2, 36))
ALONE = torch.tensor([i for i in range(37) if i not in (9, 30, 36)])  # a coarse vocabulary: one place for each group


def coarse(logits: torch.Tensor) -> torch.Tensor:
    """Log-probs of the coarsened distribution, by adding probabilities."""
    p = torch.softmax(logits, -1).clone()
    for first, *others in GROUPS:
        p[:, first] = p[:, first] + p[:, others].sum(-1)
    return p[:, ALONE].log()


def test_three_ends_and_a_word_by_hand():
    """p = (½, ¼, ¼ of words) and q = (¼, ½, ¼), the first two one end: p = q = (¾, ¼), and nothing is left to learn."""
    student = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log().requires_grad_()
    teacher = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log()
    plain, grouped = Objective(), Objective(eos_groups=((0, 1),))
    ids = torch.tensor([1])
    assert plain.per_token(student, DenseTarget(logits=teacher), ids).loss.item() == pytest.approx(0.25 * math.log(2))
    out = grouped.per_token(student, DenseTarget(logits=teacher), ids)
    out.loss.sum().backward()
    assert out.loss.item() == pytest.approx(0.0, abs=1e-15)
    assert student.grad is not None and float(student.grad.abs().max()) < 1e-15
    assert out.metrics["student_logp"].item() == pytest.approx(math.log(0.75))


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=named)
def test_the_loss_is_that_of_the_coarser_distributions_and_so_is_the_gradient(divergence):
    world = World(23, 7, 37)
    student, found = world.logits(), []
    for groups in (True, False):
        leaf = student.clone().requires_grad_()
        if groups:
            objective = Objective(**divergence, eos_groups=GROUPS)
            loss = objective.per_token(leaf, DenseTarget(logits=world.teacher_logits()), world.response_ids).loss
        else:
            ids = torch.zeros(23, dtype=torch.long)
            target = DenseTarget(logits=coarse(world.teacher_logits()))
            loss = Objective(**divergence).per_token(coarse(leaf), target, ids).loss
        loss.square().sum().backward()
        found.append({"loss": loss.detach(), "gradient": leaf.grad})
    assert_same(found[0], found[1], 1e-12)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("kind", ["hidden", "dense", "probability", "logit", "loss"])
@pytest.mark.parametrize("divergence", CLOSED, ids=named)
def test_the_fused_loss_and_its_metrics_are_those_of_whole_logits(divergence, kind, impl):
    world = World(23, 7, 37)
    objective, target = Objective(**divergence, eos_groups=GROUPS), world.target(kind)

    def fused() -> dict[str, torch.Tensor]:
        leaves = [part.clone().requires_grad_() for part in (world.hidden_states, world.weight, world.bias)]
        total, per_token, metrics = linear_objective(
            leaves[0], leaves[1], target, world.response_ids, objective, bias=leaves[2],
            token_weights=world.token_weights, eos_ids=(9, 2), chunk_tokens=5, impl=impl,
        )  # fmt: skip
        total.backward()
        return {"loss": per_token, **metrics, **{n: leaf.grad for n, leaf in zip("hwb", leaves, strict=True)}}

    def whole() -> dict[str, torch.Tensor]:
        leaves = [part.clone().requires_grad_() for part in (world.hidden_states, world.weight, world.bias)]
        logits = leaves[0] @ leaves[1].T + leaves[2]
        loss, metrics = objective_from_logits(logits, dense(target), world.response_ids, objective, eos_ids=(9, 2))
        (loss * world.token_weights).sum().backward()
        return {"loss": loss.detach(), **metrics, **{n: leaf.grad for n, leaf in zip("hwb", leaves, strict=True)}}

    assert_same(fused(), whole(), 1e-11)


def dense(target):
    if isinstance(target, TeacherMixture):
        return replace(target, targets=tuple(dense(member) for member in target.targets))
    if isinstance(target, HiddenTarget):
        logits = target.hidden @ target.head.weight.T
        return DenseTarget(logits=logits if target.head.bias is None else logits + target.head.bias)
    return target


def test_the_probability_of_an_end_is_that_of_its_whole_group():
    world = World(9, 7, 37)
    _, _, metrics = linear_objective(
        world.hidden_states, world.weight, world.target("hidden"), world.response_ids, Objective(eos_groups=GROUPS),
        bias=world.bias, token_weights=world.token_weights, eos_ids=(30,),
    )  # fmt: skip
    p = torch.softmax(world.logits(), -1)
    torch.testing.assert_close(metrics["eos_prob"], p[:, [5, 9, 30]].sum(-1))


@pytest.mark.parametrize("divergence", CLOSED, ids=named)
def test_impossible_members_and_whole_impossible_groups_are_what_they_are(divergence):
    """−inf for one member, and for a whole group, of the teacher or of both; rows that are infinite are done again."""
    world = World(8, 7, 37)
    world.parts["bias"][36] = -torch.inf
    logits = world.teacher_logits()
    logits[0, 9] = -torch.inf
    logits[1:3, [5, 9, 30]] = -torch.inf
    logits[3, [2, 36]] = -torch.inf
    found, ids = {}, torch.full_like(world.response_ids, 11)
    for impl in ("chunked", "reference"):
        leaf = world.hidden_states.clone().requires_grad_()
        total, per_token, _ = linear_objective(
            leaf, world.weight, DenseTarget(logits=logits), ids, Objective(**divergence, eos_groups=GROUPS),
            bias=world.bias, token_weights=world.token_weights, chunk_tokens=3, impl=impl,
        )  # fmt: skip
        total.backward()
        found[impl] = {"loss": per_token, "h": leaf.grad}
    infinite = found["reference"]["loss"].isinf().tolist()
    assert infinite == [False, *[divergence["divergence"] in ("reverse_kl", "forward_reverse_kl")] * 3, *[False] * 4]
    assert_same(found["chunked"], found["reference"], 1e-11)


def test_merging_twice_changes_nothing_and_ids_map_to_the_first():
    world = World(5, 7, 37)
    once = merge_tokens(world.logits(), GROUPS)
    torch.testing.assert_close(merge_tokens(once, GROUPS), once, rtol=0, atol=1e-14)
    assert first_of(torch.tensor([[9, 36], [5, 0]]), GROUPS).tolist() == [[5, 2], [5, 0]]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"eos_groups": (3, 4)}, "must be groups of token ids"),
        ({"eos_groups": ((3,),)}, "two token ids"),
        ({"eos_groups": ((3, -1),)}, "two token ids"),
        ({"eos_groups": ((3, 4), (4, 5))}, "names a token twice"),
        ({"eos_groups": ((3, 4),), "support": "teacher_top_k"}, "support='full'"),
        ({"eos_groups": ((3, 4),), "student_temperature": 2.0}, "temperatures of 1"),
    ],
)
def test_what_cannot_be_grouped_is_refused_with_what_to_do(settings, said):
    with pytest.raises(ObjectiveError, match=said):
        Objective(**settings)


def test_tokens_beyond_the_vocabulary_policies_and_minimal_memory_are_refused():
    world = World(5, 7, 37)
    fixed = {"token_weights": world.token_weights, "bias": world.bias}
    given = (world.hidden_states, world.weight, world.target("hidden"), world.response_ids)
    with pytest.raises(ObjectiveError, match="names token 40"):
        linear_objective(*given, Objective(eos_groups=((3, 40),)), **fixed)
    policy = PolicyTerm(advantages=world.advantages)
    with pytest.raises(ObjectiveError, match="policy term"):
        linear_objective(*given, Objective(eos_groups=GROUPS), policy=policy, **fixed)
    with pytest.raises(ObjectiveError, match="memory='fast'"):
        linear_objective(*given, Objective(eos_groups=GROUPS), memory="minimal", **fixed)
    with pytest.raises(ObjectiveError, match="beyond the 37 entries"):
        Objective(eos_groups=((3, 40),)).per_token(world.logits(), DenseTarget(logits=world.teacher_logits()), given[3])

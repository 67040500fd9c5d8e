"""How a batch is cut must not matter: micro-batches, packing, data-parallel shares give one loss and one gradient."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from opd.config import OptimizerConfig
from opd.data.pack import group_by_length, pack
from opd.errors import NonFiniteError
from opd.losses import Objective
from opd.teachers.vocabulary import VocabularyMatch
from opd.testing import random_logits, random_rollout, tiny_causal_lm
from opd.trainer.metrics import TokenMetrics
from opd.trainer.student import Student
from opd.types import DenseTarget, Rollout

VOCAB = 40
LENGTHS = (1, 9, 3, 7, 2, 5, 8, 4)
REDUCTIONS = ("token_mean", "sequence_mean")


@pytest.fixture(scope="module")
def model():
    return tiny_causal_lm(VOCAB, hidden=32, initializer_range=0.3, max_positions=64)


@pytest.fixture(scope="module")
def scored() -> tuple[list[Rollout], list[DenseTarget]]:
    rollouts = [random_rollout(2 + 3 * (i % 3), n, VOCAB, seed=i, index=i) for i, n in enumerate(LENGTHS)]
    return rollouts, [DenseTarget(logits=random_logits(n, VOCAB, seed=100 + i)) for i, n in enumerate(LENGTHS)]


def student_of(model) -> Student:
    return Student(
        copy.deepcopy(model),
        OptimizerConfig(),
        vocabulary=VocabularyMatch(size=VOCAB),
        eos_ids=(0,),
        teacher_logits=lambda target: target.hidden,
        total_steps=10,
    )


def loss_and_gradient(model, rollouts, targets, objective, layout, budget, count) -> tuple[float, torch.Tensor]:
    student = student_of(model)
    batches = pack(
        rollouts,
        targets,
        layout=layout,
        tokens_per_microbatch=budget,
        pad_id=0,
        reduction=objective.reduction,
        global_count=count,
    )
    total = 0.0
    for batch in batches:
        loss = student.loss(batch, objective, TokenMetrics())
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in student.parameters()])


def count_of(reduction: str, rollouts) -> float:
    return len(rollouts) if reduction == "sequence_mean" else sum(len(r.response_ids) for r in rollouts)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", ["right_padded", "left_padded", "packed"])
@pytest.mark.parametrize("budget", [1, 30, 10_000], ids=["eight of one", "some", "one of eight"])
def test_any_cut_gives_the_same_loss_and_gradient(model, scored, reduction, layout, budget):
    rollouts, _ = scored
    objective = Objective(reduction=reduction)
    count = count_of(reduction, rollouts)
    loss, gradient = loss_and_gradient(model, *scored, objective, "right_padded", 10_000, count)
    other_loss, other_gradient = loss_and_gradient(model, *scored, objective, layout, budget, count)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert (gradient - other_gradient).norm() <= 1e-6 * max(1.0, float(gradient.norm())) * 10


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_two_data_parallel_shares_of_four_add_up_to_one_batch_of_eight(model, scored, reduction):
    rollouts, targets = scored
    objective = Objective(reduction=reduction)
    count = count_of(reduction, rollouts)
    whole = loss_and_gradient(model, rollouts, targets, objective, "packed", 10_000, count)
    halves = [
        loss_and_gradient(model, rollouts[i::2], targets[i::2], objective, "right_padded", 40, count) for i in (0, 1)
    ]
    assert halves[0][0] + halves[1][0] == pytest.approx(whole[0], rel=1e-6)
    assert (halves[0][1] + halves[1][1] - whole[1]).norm() <= 1e-5 * whole[1].norm()


def test_dividing_by_each_micro_batch_s_own_count_would_not_pass(model, scored):
    """The mistake that the tests above are for: a local count per share changes the loss visibly."""
    rollouts, targets = scored
    objective = Objective()
    whole = loss_and_gradient(model, rollouts, targets, objective, "packed", 10_000, None)
    local = [loss_and_gradient(model, rollouts[i::2], targets[i::2], objective, "packed", 10_000, None) for i in (0, 1)]
    assert abs((local[0][0] + local[1][0]) / 2 - whole[0]) > 1e-3


def test_token_mean_is_the_mean_over_all_response_tokens(model, scored):
    rollouts, targets = scored
    student, metrics = student_of(model), TokenMetrics()
    batches = pack(rollouts, targets, layout="packed", tokens_per_microbatch=30, pad_id=0)
    total = sum(student.loss(batch, Objective(), metrics).item() for batch in batches)
    values = [v for _, row in metrics.per_rollout("reverse_kl") for v in row.tolist()]
    assert len(values) == sum(LENGTHS)
    assert total == pytest.approx(sum(values) / len(values), rel=1e-5)


def test_update_equals_one_plain_adamw_step_on_the_whole_batch(model, scored):
    """Micro-batches, accumulation and clipping end in the same weights as a textbook step."""
    rollouts, targets = scored
    student = student_of(model)
    student.learning_rate_factors, student.max_grad_norm = [1.0], 0.5
    for group in student.optimizers[0].param_groups:
        group["peak_lr"] = 1e-2
    student.update(pack(rollouts, targets, layout="packed", tokens_per_microbatch=25, pad_id=0), Objective())

    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    total, count = torch.zeros(()), sum(LENGTHS)
    for rollout, target in zip(rollouts, targets, strict=True):
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
        logp = plain(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
        teacher = target.logits.log_softmax(-1)
        total = total + (logp.exp() * (logp - teacher)).sum() / count
    total.backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    optimizer.step()
    for (name, ours), (_, theirs) in zip(student.model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0, msg=name)


def test_a_failed_update_leaves_nothing_behind_for_the_next_one(model, scored):
    """The first micro-batch had its backward pass before the second turned out bad: that gradient must not be added later."""
    rollouts, targets = scored
    good = pack(rollouts, targets, layout="packed", tokens_per_microbatch=25, pad_id=0)
    spoilt = dataclasses.replace(good[-1].target, logits=torch.full_like(good[-1].target.logits, torch.nan))
    tried, fresh = student_of(model), student_of(model)
    with pytest.raises(NonFiniteError, match="not changed"):
        tried.update([*good[:-1], dataclasses.replace(good[-1], target=spoilt)], Objective())
    for student in (tried, fresh):
        student.update(good, Objective())
    assert all(torch.equal(a, b) for a, b in zip(tried.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize("layout", ["right_padded", "packed"])
def test_a_plan_respects_its_budget_and_keeps_every_sequence_once(layout):
    lengths = [5, 1, 30, 7, 7, 2, 12]
    groups = group_by_length(lengths, budget=24, layout=layout)
    assert sorted(i for group in groups for i in group) == list(range(7))
    for group in groups:
        cost = sum(lengths[i] for i in group) if layout == "packed" else len(group) * max(lengths[i] for i in group)
        assert cost <= 24 or len(group) == 1

"""A token of weight 0 takes no part in a loss or a gradient, whatever stands in its row."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from kernel_cases import WAYS, World

from opd.errors import NonFiniteError
from opd.kernels import PolicyTerm, linear_divergence, linear_objective
from opd.losses import Objective
from opd.types import DenseTarget, HiddenTarget, SampledTarget, TopKTarget

WORLD = World(9, 5, 17)
BAD = torch.tensor([2, 6])
WEIGHTS = WORLD.token_weights.index_fill(0, BAD, 0.0)
KEPT = torch.tensor([0, 1, 3, 4, 5, 7, 8])
KINDS = ("hidden", "dense", "top_k", "sampled", "probability", "loss", "none")


def poisoned(target, value: float):
    """The target with `value` in the rows of weight 0."""
    if isinstance(target, HiddenTarget):
        return replace(target, hidden=target.hidden.index_fill(0, BAD, value))
    if isinstance(target, DenseTarget):
        return DenseTarget(logits=target.logits.index_fill(0, BAD, value))
    if isinstance(target, TopKTarget):
        logps = target.teacher_logp.index_fill(0, BAD, value), target.sampled_logp.index_fill(0, BAD, value)
        return TopKTarget(ids=target.ids, teacher_logp=logps[0], sampled_logp=logps[1])
    if isinstance(target, SampledTarget):
        return SampledTarget(teacher_logp=target.teacher_logp.index_fill(0, BAD, value))
    return target if target is None else replace(target, targets=tuple(poisoned(t, value) for t in target.targets))


def policy(value: float = 0.0) -> PolicyTerm:
    term = WORLD.policy()
    assert term.old_log_prob is not None and term.importance_weights is not None
    return PolicyTerm(
        advantages=term.advantages.index_fill(0, BAD, value),
        old_log_prob=term.old_log_prob.index_fill(0, BAD, value),
        importance_weights=term.importance_weights.index_fill(0, BAD, value),
        clip_range=0.2,
    )


def gradients(call, hidden: torch.Tensor):
    leaves = hidden.clone().requires_grad_(), WORLD.weight.clone().requires_grad_(), WORLD.bias.clone().requires_grad_()
    loss = call(*leaves)
    loss.backward()
    return loss.detach(), *(leaf.grad for leaf in leaves)


def assert_they_take_no_part(call, value: float) -> None:
    """`call(student's hidden states, weight, bias, value in the rows of weight 0)`."""
    wanted = gradients(lambda *leaves: call(*leaves, 0.0), WORLD.hidden_states)
    found = gradients(lambda *leaves: call(*leaves, value), WORLD.hidden_states.index_fill(0, BAD, value))
    for a, b in zip(found, wanted, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)
    assert not found[1][BAD].any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_leaves_them_out(kind, way, value):
    if way == "minimal" and kind in ("probability", "loss"):
        pytest.skip("minimal takes one teacher")

    def loss(hidden, weight, bias, filled):
        target = poisoned(WORLD.target(kind), filled)
        return linear_divergence(
            hidden, weight, target, bias=bias, token_weights=WEIGHTS, response_ids=WORLD.response_ids, policy=policy(filled), **WAYS[way]
        ).loss  # fmt: skip

    assert_they_take_no_part(loss, value)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_objective_leaves_them_out_of_all_but_their_own_diagnostics(kind, impl):
    objectives = {
        "top_k": Objective(support="teacher_top_k", top_k=4),
        "sampled": Objective(support="sampled", estimator="k1", delivery="advantage"),
    }
    seen = {}

    def loss(hidden, weight, bias, filled):
        total, per_token, metrics = linear_objective(
            hidden, weight, poisoned(WORLD.target(kind), filled), WORLD.response_ids, objectives.get(kind, Objective()),
            token_weights=WEIGHTS, bias=bias, policy=policy(filled), eos_ids=(3,), impl=impl, chunk_tokens=4,
        )  # fmt: skip
        seen[filled] = {"loss": per_token, **metrics}
        return total

    assert_they_take_no_part(loss, math.nan)
    (clean, told) = seen.values()
    assert clean.keys() == told.keys()
    for name, value in clean.items():
        torch.testing.assert_close(told[name][KEPT], value[KEPT], msg=lambda m, n=name: f"{n}: {m}")
        assert kind == "none" or name not in ("reverse_kl", "student_entropy") or value[BAD].all()


def test_diagnostics_of_rows_of_weight_0_are_told_as_of_any():
    plain = linear_objective(
        WORLD.hidden_states, WORLD.weight, WORLD.target("hidden"), WORLD.response_ids, Objective(), token_weights=WORLD.token_weights
    )  # fmt: skip
    for weights in (WEIGHTS, torch.zeros(9, dtype=torch.float64)):
        found = linear_objective(
            WORLD.hidden_states, WORLD.weight, WORLD.target("hidden"), WORLD.response_ids, Objective(), token_weights=weights
        )  # fmt: skip
        torch.testing.assert_close(found[1], plain[1])
        assert found[2].keys() == plain[2].keys()
        for name, value in plain[2].items():
            torch.testing.assert_close(found[2][name], value)


def test_a_row_that_counts_is_still_named():
    hidden = WORLD.hidden_states.index_fill(0, torch.tensor([2, 4]), math.nan)
    with pytest.raises(NonFiniteError, match="nan in row 4"):
        linear_divergence(hidden, WORLD.weight, WORLD.target("hidden"), token_weights=WEIGHTS)

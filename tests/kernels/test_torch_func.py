"""torch.func.grad and grad_and_value over the fused losses give what backward() gives."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import WAYS, World

from opd.errors import ObjectiveError
from opd.kernels import PolicyTerm, TeacherMixture, linear_divergence, linear_log_prob, linear_objective
from opd.losses import Objective
from opd.types import DenseTarget, Head, HiddenTarget

WORLD = World(11, 5, 17)
IDS, WEIGHTS = WORLD.response_ids, WORLD.token_weights


def by_backward(call, *inputs):
    leaves = [value.clone().requires_grad_() for value in inputs]
    value = call(*leaves)
    value.backward()
    return value.detach(), tuple(leaf.grad for leaf in leaves)


def assert_func_agrees(call, *inputs) -> None:
    value, wanted = by_backward(call, *inputs)
    every = tuple(range(len(inputs)))
    found, got = torch.func.grad_and_value(call, argnums=every)(*inputs)
    torch.testing.assert_close(got, value)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    for number in every:  # of one input: the others are constants, and their products are not run
        torch.testing.assert_close(torch.func.grad(call, argnums=number)(*inputs), wanted[number])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["hidden", "dense", "top_k", "sampled", "probability", "loss"])
def test_of_a_divergence(kind, way):
    def loss(hidden, weight, bias):
        out = linear_divergence(
            hidden, weight, target, bias=bias, token_weights=WEIGHTS, response_ids=IDS, policy=WORLD.policy(), **WAYS[way]
        )  # fmt: skip
        return 3.0 * out.loss + 1.0

    if way == "minimal" and kind in ("probability", "loss"):
        pytest.skip("minimal takes one teacher")
    target = WORLD.target(kind)
    assert_func_agrees(loss, WORLD.hidden_states, WORLD.weight, WORLD.bias)


def test_with_tokens_of_weight_0_and_the_per_token_numbers_beside():
    weights = WEIGHTS * (torch.arange(11) % 3 != 0)

    def loss(hidden, weight):
        out = linear_divergence(hidden, weight, WORLD.target("hidden"), token_weights=weights)
        return out.loss, out.per_token

    gradient, (value, per_token) = torch.func.grad_and_value(loss, has_aux=True)(WORLD.hidden_states, WORLD.weight)
    wanted, (expected, _) = by_backward(lambda *given: loss(*given)[0], WORLD.hidden_states, WORLD.weight)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(value, wanted)
    assert per_token.shape == (11,) and not per_token[0]


@pytest.mark.parametrize(
    "objective",
    [
        Objective(divergence="generalized_jsd"),
        Objective(teacher_logp_floor=-3.0),
        Objective(support="sampled", estimator="k1", delivery="advantage", discount=0.5),
    ],
    ids=["jsd", "floor", "discount"],
)
def test_of_an_objective(objective):
    def loss(hidden, weight):
        sequence = torch.arange(11) // 4
        return linear_objective(
            hidden, weight, WORLD.target("hidden"), IDS, objective, token_weights=WEIGHTS, sequence_index=sequence
        )[0]

    assert_func_agrees(loss, WORLD.hidden_states, WORLD.weight)


def test_of_log_probs_and_entropies():
    def loss(hidden, weight, bias):
        logp, entropy = linear_log_prob(hidden, weight, IDS, bias=bias)
        return (WEIGHTS * logp).sum() - 0.1 * entropy[3:].sum()

    assert_func_agrees(loss, WORLD.hidden_states, WORLD.weight, WORLD.bias)
    assert_func_agrees(lambda *given: linear_log_prob(*given, IDS)[0][2:5].sum(), WORLD.hidden_states, WORLD.weight)


def test_through_a_function_of_the_inputs():
    """The loss in the middle of a chain, as in a model: a chain rule on both sides."""

    def loss(x, weight):
        hidden = torch.tanh(x @ x.T @ x)
        return linear_divergence(hidden, weight, WORLD.target("dense"), token_weights=WEIGHTS).loss ** 2

    assert_func_agrees(loss, WORLD.hidden_states / 5, WORLD.weight)


def test_of_a_teacher_that_is_computed_inside():
    """As a teacher's forward pass inside the loss function gives it: its tensors belong to the transform too."""

    def loss(hidden, weight):
        made = WORLD.teacher_hidden * 1.0
        target = HiddenTarget(hidden=made, head=Head(weight=WORLD.teacher_weight * 1.0))
        policy = PolicyTerm(advantages=WORLD.advantages * hidden.detach().sum())
        weights = WEIGHTS * 1.0
        out = linear_divergence(hidden, weight, target, token_weights=weights, response_ids=IDS, policy=policy)
        mixed = TeacherMixture(
            targets=(target, DenseTarget(logits=made @ target.head.weight.T)), weights=weights.new_tensor([0.5, 0.5])
        )
        return out.loss + linear_objective(hidden, weight, mixed, IDS, Objective(), token_weights=weights)[0]

    assert_func_agrees(loss, WORLD.hidden_states, WORLD.weight)


def test_second_derivatives_are_refused():
    def loss(hidden):
        return linear_divergence(hidden, WORLD.weight, WORLD.target("hidden")).loss

    with pytest.raises((ObjectiveError, RuntimeError)):
        torch.func.hessian(loss)(WORLD.hidden_states)

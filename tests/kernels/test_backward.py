"""Gradients are made in the forward pass and given away once: scaled, added up, in the dtype of what they belong to."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import CLOSED, GRADIENTS, OUTPUTS, WHOLE, World, named, run

from opd.errors import ObjectiveError
from opd.kernels import PolicyTerm, linear_divergence
from opd.kernels.spec import select_target
from opd.types import HiddenTarget

WORLD = World(23, 7, 37)
KINDS = (*WHOLE, "top_k", "sampled", "none")


def leaves(world: World = WORLD) -> list[torch.Tensor]:
    return [part.clone().requires_grad_() for part in (world.hidden_states, world.weight, world.bias)]


def test_the_gradient_is_scaled_by_what_the_loss_is_multiplied_with():
    plain = run(WORLD, "hidden", "chunked")
    for scale in (3.0, -0.25, 0.0):
        scaled = run(WORLD, "hidden", "chunked", scale=scale)
        for name in GRADIENTS:
            torch.testing.assert_close(scaled[name], scale * plain[name], rtol=1e-15, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_up_to_the_batch(kind):
    policy = WORLD.policy()
    hidden, weight, bias = leaves()
    total = 0.0
    for rows in (slice(0, 9), slice(9, 10), slice(10, 23)):
        part = PolicyTerm(
            advantages=policy.advantages[rows],
            old_log_prob=policy.old_log_prob[rows],
            clip_range=policy.clip_range,
            importance_weights=policy.importance_weights[rows],
            weight=policy.weight,
        )
        out = linear_divergence(
            hidden[rows],
            weight,
            select_target(WORLD.target(kind), rows),
            bias=bias,
            token_weights=WORLD.token_weights[rows],
            response_ids=WORLD.response_ids[rows],
            policy=part,
            entropy_bonus=0.1,
            chunk_tokens=4,
        )
        out.loss.backward()
        total += out.loss.item()
    wanted = run(WORLD, kind, "chunked", policy=True, entropy_bonus=0.1)
    assert total == pytest.approx(wanted["loss"].item(), rel=1e-13)
    for leaf, name in zip((hidden, weight, bias), GRADIENTS, strict=True):
        torch.testing.assert_close(leaf.grad, wanted[name], rtol=0, atol=1e-13)


def test_two_losses_of_one_weight_add_their_gradients_in_one_backward_or_in_two():
    first, second = (run(WORLD, kind, "chunked", token_weights=torch.ones(23)) for kind in ("hidden", "dense"))
    hidden, weight, bias = leaves()

    def losses():
        return [linear_divergence(hidden, weight, WORLD.target(k), bias=bias).loss for k in ("hidden", "dense")]

    for together in (True, False):
        hidden.grad = weight.grad = bias.grad = None
        a, b = losses()
        if together:
            (a + 2 * b).backward()
        else:
            a.backward()
            (2 * b).backward()
        for leaf, name in zip((hidden, weight, bias), GRADIENTS, strict=True):
            torch.testing.assert_close(leaf.grad, first[name] + 2 * second[name], rtol=0, atol=1e-13)


def test_gradients_reach_what_the_hidden_states_came_from():
    hidden, weight, _ = leaves()
    mixer = torch.eye(7, dtype=torch.float64).requires_grad_()
    linear_divergence(torch.tanh(hidden @ mixer), weight, WORLD.target("hidden")).loss.backward()
    again, plain = hidden.detach().clone().requires_grad_(), mixer.detach().clone().requires_grad_()
    linear_divergence(
        torch.tanh(again @ plain), weight.detach(), WORLD.target("hidden"), impl="reference"
    ).loss.backward()
    torch.testing.assert_close(mixer.grad, plain.grad, rtol=1e-12, atol=1e-13)


def test_the_inputs_are_left_as_they_were():
    hidden, weight, bias = leaves()
    target = WORLD.target("loss")
    tensors = [hidden, weight, bias, WORLD.token_weights, target.weights, target.targets[0].hidden]
    tensors += [target.targets[0].head.weight, target.targets[0].head.bias]
    before = [tensor.detach().clone() for tensor in tensors]
    dense = WORLD.target("dense")
    logits = dense.logits.clone()
    for t in (target, dense):
        linear_divergence(hidden, weight, t, bias=bias, token_weights=WORLD.token_weights).loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert torch.equal(dense.logits, logits)


@pytest.mark.parametrize(
    "name", ["per_token", "student_entropy", "teacher_entropy", "student_logp", "policy_loss", "clipped"]
)
def test_backward_through_a_per_token_output_raises(name):
    def call():
        hidden, weight, bias = leaves()
        return linear_divergence(
            hidden, weight, WORLD.target("hidden"), bias=bias, response_ids=WORLD.response_ids, policy=WORLD.policy()
        )

    with pytest.raises(ObjectiveError, match=r"per-token output.*token_weights.*\.detach\(\).*linear_log_prob"):
        getattr(call(), name).sum().backward()
    out = call()
    with pytest.raises(ObjectiveError, match="per-token output"):
        (out.loss + getattr(out, name).sum()).backward()
    out = call()
    (out.loss + getattr(out, name).detach().sum()).backward()


def test_a_second_backward_raises():
    hidden, weight, _ = leaves()
    out = linear_divergence(hidden, weight, WORLD.target("hidden"))
    out.loss.backward(retain_graph=True)
    with pytest.raises(ObjectiveError, match=r"differentiated twice.*Call the function again, or add the losses"):
        out.loss.backward()


def test_per_token_outputs_are_the_callers_to_change():
    advantages = torch.randn(23, dtype=torch.float64)
    hidden, weight, _ = leaves()
    out = linear_divergence(
        hidden,
        weight,
        HiddenTarget(hidden=WORLD.teacher_hidden, head=WORLD.target("hidden").head),
        response_ids=WORLD.response_ids,
        policy=PolicyTerm(advantages=advantages),
    )
    before = advantages.clone()
    for name in OUTPUTS:
        value = getattr(out, name).detach()
        value.zero_()
    assert torch.equal(advantages, before)
    out.loss.backward()


@pytest.mark.parametrize("divergence", CLOSED, ids=named)
def test_gradients_come_in_the_dtype_of_what_they_belong_to(divergence):
    world = World(7, 4, 11, torch.bfloat16)
    hidden, weight = (part.bfloat16().requires_grad_() for part in (world.hidden_states, world.weight))
    bias = world.bias.float().requires_grad_()
    out = linear_divergence(hidden, weight, world.target("hidden", torch.bfloat16), bias=bias, **divergence)
    out.loss.backward()
    assert (hidden.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert out.loss.dtype == out.per_token.dtype == torch.float32

"""Chunks are a way to walk, not a setting of the loss; what nobody needs is not computed; gradients are given away once."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import CLOSED, GRADIENTS, OUTPUTS, WHOLE, Products, World, assert_same, named, run

from opd.errors import ObjectiveError
from opd.kernels import PolicyTerm, linear_divergence
from opd.kernels.request import select_target
from opd.types import HiddenTarget

WORLD = World(23, 7, 37)
KINDS = (*WHOLE, "top_k", "sampled", "none")
SETTINGS = {kind: {"policy": True, "entropy_bonus": 0.1} for kind in KINDS}


def ready(kind: str):
    """A target made beforehand, so that its products are not counted."""
    target = WORLD.target(kind)
    return lambda _: target


def leaves(world: World = WORLD) -> list[torch.Tensor]:
    return [part.clone().requires_grad_() for part in (world.hidden_states, world.weight, world.bias)]


# --- chunks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_depend_on_the_chunk(kind):
    wanted = run(WORLD, kind, "chunked", chunk_tokens=23, **SETTINGS[kind])
    for chunk in (1, 2, 5, 22, 24, 1000, None):
        assert_same(run(WORLD, kind, "chunked", chunk_tokens=chunk, **SETTINGS[kind]), wanted)


def test_rows_worked_on_together_are_no_setting_either(monkeypatch):
    wanted = run(WORLD, "hidden", "chunked", **SETTINGS["hidden"])
    for module in ("opd.kernels.generic", "opd.kernels.normal", "opd.kernels.impl.chunked", "opd.kernels.log_prob"):
        monkeypatch.setattr(f"{module}.CPU_PIECE", 2 * WORLD.vocab, raising=False)
    for kind in KINDS:
        for divergence in ("reverse_kl", "total_variation") if kind in WHOLE else ("reverse_kl",):
            settings = {"divergence": divergence, **SETTINGS[kind]}
            wanted = run(WORLD, kind, "reference", **settings)
            assert_same(run(WORLD, kind, "chunked", chunk_tokens=7, **settings), wanted)


@pytest.mark.parametrize("kind", WHOLE)
def test_float32_results_do_not_depend_on_the_chunk_beyond_rounding(kind):
    world = World(23, 7, 37, torch.float32)
    wanted = run(world, kind, "chunked", torch.float32, chunk_tokens=23)
    for chunk in (1, 2, 5):
        assert_same(run(world, kind, "chunked", torch.float32, chunk_tokens=chunk), wanted, 3e-6)


@pytest.mark.parametrize(
    ("tokens", "chunk", "rows"), [(23, 10, [10, 10, 3]), (100, 70, [64, 36]), (5, 70, [5]), (1, 1, [1])]
)
def test_chunks_are_as_few_as_can_be_and_no_larger_than_asked_for(tokens, chunk, rows):
    """Where they can be, they are alike in size, in steps of 16 rows."""
    world = World(tokens, 7, 37)
    target = world.target("dense")
    with Products() as seen:
        run(world, lambda _: target, "chunked", chunk_tokens=chunk, grads="")
    assert [left[0] for left, _ in seen.shapes] == rows


# --- tokens that do not count -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_weight_0_are_as_if_they_were_not_there(kind):
    counted = torch.arange(23) % 3 != 1
    weights = WORLD.token_weights * counted
    rows = counted.nonzero().squeeze(-1)
    found = run(WORLD, kind, "chunked", chunk_tokens=5, token_weights=weights, **SETTINGS[kind])
    fewer = World(23, 7, 37)
    for name in ("hidden", "response_ids", "token_weights", "advantages", "old", "importance"):
        fewer.parts[name] = fewer.parts[name][rows]
    wanted = run(fewer, lambda _: select_target(WORLD.target(kind), rows), "chunked", chunk_tokens=5, **SETTINGS[kind])
    for name in OUTPUTS:
        if name in wanted:
            assert not found[name][~counted].any()
            found[name] = found[name][rows]
    assert not found["d_hidden"][~counted].any()
    found["d_hidden"] = found["d_hidden"][rows]
    assert_same(found, wanted)


@pytest.mark.parametrize("kind", ["hidden", "loss", "top_k"])
def test_tokens_of_weight_0_enter_no_product(kind):
    weights = torch.where(torch.arange(23) < 8, 1.0, 0.0)
    target = ready(kind)
    with Products() as seen:
        run(WORLD, target, "chunked", token_weights=weights)
    assert seen.count
    assert {8} == {size for left, _ in seen.shapes for size in left if size not in (7, 10, 37)}


@pytest.mark.parametrize("grads", ["hwb", "h", "w", "b", ""])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_a_counted_token_gives_0_and_zero_gradients(kind, grads):
    nothing, target = torch.zeros(23, dtype=torch.float64), ready(kind)
    for impl in ("chunked", "reference"):
        with Products() as seen:
            found = run(WORLD, target, impl, token_weights=nothing, grads=grads, **SETTINGS[kind])
        assert impl == "reference" or not seen.count
        assert all(not value.any() for value in found.values())
        some = run(WORLD, kind, impl, grads=grads, **SETTINGS[kind])
        assert {name: value.shape for name, value in found.items()} == {
            name: value.shape for name, value in some.items()
        }


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_gives_0_and_zero_gradients(kind):
    empty = World(0, 7, 37)
    for impl in ("chunked", "reference"):
        found = run(empty, kind, impl, **SETTINGS[kind])
        assert found["loss"].item() == 0 and found["per_token"].shape == (0,)
        assert found["d_hidden"].shape == (0, 7)
        assert found["d_weight"].shape == (37, 7) and not found["d_weight"].any()
        assert found["d_bias"].shape == (37,) and not found["d_bias"].any()


def test_negative_weights_are_weights():
    """An importance weight times a sign is legal; only 0 means that a token does not count."""
    weights = WORLD.token_weights - 0.5
    wanted = run(WORLD, "hidden", "reference", token_weights=weights)
    assert_same(run(WORLD, "hidden", "chunked", token_weights=weights, chunk_tokens=5), wanted)


def test_weights_and_policies_in_another_precision_are_used_in_that_of_the_logits():
    world = World(23, 7, 37, torch.float32)
    for kind in ("hidden", "top_k", "sampled"):
        policy = world.policy(torch.float64)
        for dtype in (torch.float64, torch.bfloat16):
            weights = (torch.arange(23) % 4 / 4).to(dtype)
            settings = {"token_weights": weights, "policy": policy, "sampler_logp": world.old}
            wanted = run(world, kind, "reference", torch.float32, **settings)
            got = run(world, kind, "chunked", torch.float32, chunk_tokens=5, **settings)
            assert got["loss"].dtype == torch.float32
            assert_same(got, wanted, 1e-5)


def test_a_top_k_in_double_precision_feeds_a_student_in_single():
    world = World(23, 7, 37, torch.float32)
    for tail in ("bucket", "sampled"):
        wanted = run(world, lambda _: world.target("top_k"), "reference", torch.float32, tail=tail)
        got = run(world, lambda _: world.target("top_k"), "chunked", torch.float32, tail=tail, chunk_tokens=5)
        assert_same(got, wanted, 1e-5)


# --- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "grads", "products"),
    [
        ("hidden", "hwb", 4), ("hidden", "hb", 3), ("hidden", "wb", 3), ("hidden", "b", 2), ("hidden", "", 2),
        ("dense", "hwb", 3), ("dense", "hb", 2), ("dense", "wb", 2), ("dense", "", 1),
        ("top_k", "hwb", 3), ("top_k", "hb", 2), ("top_k", "", 1),
        ("sampled", "hwb", 3), ("none", "hwb", 3), ("none", "", 1),
        ("probability", "hwb", 5), ("logit", "", 3), ("loss", "hwb", 5), ("loss", "hb", 4),
    ],
)  # fmt: skip
def test_products_per_chunk(kind, grads, products):
    """Student and teachers, and one for each gradient of the two that are wanted; policy and entropy ride along."""
    divergences = ("reverse_kl", "generalized_jsd", "total_variation") if kind in WHOLE else ("reverse_kl",)
    target = ready(kind)
    for divergence in divergences:
        for settings in ({"policy": True} if kind == "none" else {}, SETTINGS[kind]):
            for chunk, chunks in ((23, 1), (8, 3)):
                with Products() as seen:
                    run(WORLD, target, "chunked", grads=grads, divergence=divergence, chunk_tokens=chunk, **settings)
                assert seen.count == products * chunks


def test_without_gradients_only_the_logits_are_multiplied():
    for context in (torch.no_grad, torch.inference_mode):
        hidden, weight, bias = leaves()
        target = WORLD.target("hidden")
        with Products() as seen, context():
            linear_divergence(hidden, weight, target, bias=bias, chunk_tokens=23)
        assert seen.count == 2


def test_backward_multiplies_nothing():
    hidden, weight, bias = leaves()
    out = linear_divergence(hidden, weight, WORLD.target("hidden"), bias=bias)
    with Products() as seen:
        out.loss.backward()
    assert seen.count == 0


def test_a_frozen_part_gets_no_gradient_and_changes_no_other():
    wanted = run(WORLD, "hidden", "chunked", policy=True)
    for grads in ("h", "w", "b", "hw", "hb", "wb", ""):
        found = run(WORLD, "hidden", "chunked", grads=grads, policy=True)
        missing = {f"d_{name}" for name in ("hidden", "weight", "bias") if name[0] not in grads}
        assert not missing & found.keys()
        assert_same(found, {name: value for name, value in wanted.items() if name not in missing})


def test_no_grad_and_inference_mode_give_the_same_numbers():
    wanted = run(WORLD, "hidden", "chunked", policy=True)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found = run(WORLD, "hidden", "chunked", grads="", policy=True)
        assert_same(found, {name: value for name, value in wanted.items() if name not in GRADIENTS})


@pytest.mark.parametrize("kind", ["hidden", "dense", "top_k"])
def test_autocast_around_the_call_changes_nothing(kind):
    world = World(23, 7, 37, torch.float32)
    wanted = run(world, kind, "chunked", torch.float32, chunk_tokens=8)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(world, kind, "chunked", torch.float32, chunk_tokens=8)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


# --- backward ---------------------------------------------------------------------------------------------------------


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
    wanted = run(WORLD, kind, "chunked", **SETTINGS[kind])
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

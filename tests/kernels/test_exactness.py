"""In float64 every way of computing a loss gives the numbers of the plain one, and gradients are those of the loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    CLOSED,
    DIVERGENCES,
    ENDS,
    OUTPUTS,
    PARTIAL,
    SAMPLED,
    TAILS,
    WHOLE,
    Settings,
    World,
    assert_same,
    named,
    run,
)
from pairwise_cases import pairwise

from opd.kernels import TeacherMixture, linear_divergence
from opd.losses import forward_kl, generalized_jsd, mix_teachers, partial_divergence, reverse_kl, support_of
from opd.types import DenseTarget, Head, HiddenTarget, TopKTarget

EXTRAS: tuple[Settings, ...] = (
    {},
    {"student_temperature": 1.7},
    {"policy": True},
    {"entropy_bonus": 0.3},
    {"policy": True, "entropy_bonus": 0.1, "distill_weight": 0.4, "student_temperature": 0.7},
)
WORLD = World(23, 7, 37)


def both(kind: str, **settings: object) -> None:
    """Seven tokens of 23 have weight 0, and chunks of 5 do not divide the rest."""
    weights = WORLD.token_weights * (torch.arange(WORLD.tokens) % 3 != 0)
    settings = {"token_weights": weights} | settings
    wanted = run(WORLD, kind, "reference", **settings)
    assert_same(run(WORLD, kind, "chunked", chunk_tokens=5, **settings), wanted)


@pairwise(kind=WHOLE, divergence=DIVERGENCES + ENDS, extra=EXTRAS)
@pytest.mark.filterwarnings("ignore:generalized_jsd with normalize=False")
def test_chunks_of_whole_rows_give_the_plain_numbers(kind, divergence, extra):
    both(kind, **divergence, **extra)
    both(kind, **divergence, **extra, teacher_temperature=1.4)


@pairwise(divergence=PARTIAL, tail=TAILS, extra=EXTRAS)
def test_chunks_of_a_top_k_give_the_plain_numbers(divergence, tail, extra):
    both("top_k", **divergence, **extra, tail=tail)
    if tail == "sampled":
        both("top_k", **divergence, tail=tail, sampler_logp=WORLD.old)


@pytest.mark.parametrize("estimator", SAMPLED, ids=named)
def test_chunks_of_response_tokens_give_the_plain_numbers(estimator):
    for extra in EXTRAS:
        both("sampled", **estimator, **extra)
        both("sampled", **estimator, **extra, sampler_logp=WORLD.old)


def test_chunks_without_a_teacher_give_the_plain_numbers():
    for extra in EXTRAS[2:]:
        both("none", **{k: v for k, v in extra.items() if k != "distill_weight"})


@pytest.mark.parametrize("kind", ["hidden", "dense", "top_k", "sampled"])
def test_values_are_the_same_when_no_gradient_is_wanted(kind):
    both(kind, grads="", policy=True, entropy_bonus=0.2)
    with torch.no_grad():
        both(kind, policy=True)


def test_a_call_without_response_ids_gives_the_same_divergence():
    for kind in (*WHOLE, "top_k"):
        wanted = run(WORLD, kind, "reference")
        got = run(WORLD, kind, "chunked", chunk_tokens=5, response_ids=None)
        assert "student_logp" not in got
        del wanted["student_logp"]
        assert_same(got, wanted)


def test_a_head_without_a_bias_gives_the_plain_numbers():
    for kind in (*WHOLE, "top_k", "sampled"):
        wanted, got = (run(WORLD, kind, impl, bias=False) for impl in ("reference", "chunked"))
        assert "d_bias" not in got
        assert_same(got, wanted)


# --- the plain version is `losses` ------------------------------------------------------------------------------------


def test_the_plain_version_is_the_loss_on_whole_logits():
    logp, logq = WORLD.logits().log_softmax(-1), WORLD.teacher_logits().log_softmax(-1)
    for name, loss in (("reverse_kl", reverse_kl), ("forward_kl", forward_kl), ("generalized_jsd", generalized_jsd)):
        out = run(WORLD, "hidden", "reference", divergence=name)
        torch.testing.assert_close(out["per_token"], loss(logp, logq), rtol=1e-12, atol=0)
        torch.testing.assert_close(out["loss"], (loss(logp, logq) * WORLD.token_weights).sum(), rtol=1e-12, atol=0)
    target = WORLD.target("top_k")
    support = support_of(target.ids)
    wanted = partial_divergence("reverse_kl", support.gather(logp), target.teacher_logp, tail="generalized")
    out = run(WORLD, "top_k", "reference", tail="generalized")
    torch.testing.assert_close(out["per_token"], wanted, rtol=1e-12, atol=0)


def test_a_mixture_is_the_mixture_of_losses():
    logp = WORLD.logits().log_softmax(-1)
    logqs = [
        (WORLD.teacher_hidden @ WORLD.teacher_weight.T + WORLD.teacher_bias).log_softmax(-1),
        (WORLD.other_hidden @ WORLD.other_weight.T).log_softmax(-1),
    ]
    for mixture in ("probability", "logit"):
        wanted = reverse_kl(logp, mix_teachers(logqs, WORLD.mixture, mixture))
        for impl in ("reference", "chunked"):
            torch.testing.assert_close(run(WORLD, mixture, impl)["per_token"], wanted, rtol=1e-11, atol=0)
    wanted = sum(w * reverse_kl(logp, q) for w, q in zip(WORLD.mixture.unbind(-1), logqs, strict=True))
    for impl in ("reference", "chunked"):
        torch.testing.assert_close(run(WORLD, "loss", impl)["per_token"], wanted, rtol=1e-11, atol=0)


@pytest.mark.parametrize("mixture", ["probability", "logit", "loss"])
def test_one_teacher_of_weight_1_among_several_is_that_teacher(mixture):
    members = (WORLD.target("hidden"), WORLD.target("dense"), WORLD.target("hidden"))
    one_hot = torch.eye(3, dtype=torch.float64)[torch.arange(WORLD.tokens) % 2]
    target = TeacherMixture(targets=members, weights=one_hot, mixture=mixture)
    # teacher 0 at even rows and 1 at odd ones; 2 never
    logits = torch.where(one_hot[:, :1] == 1, WORLD.teacher_logits(), WORLD.target("dense").logits)
    wanted = run(WORLD, lambda _: DenseTarget(logits=logits), "reference")
    got = run(WORLD, lambda _: target, "chunked", chunk_tokens=4)
    if mixture == "loss":
        del wanted["teacher_entropy"]
    assert_same(got, wanted, 1e-11)


def test_weights_per_teacher_are_weights_per_token_all_alike():
    weights = torch.tensor([0.2, 0.8], dtype=torch.float64)
    for mixture in ("probability", "logit", "loss"):
        plain = replace(WORLD.target(mixture), weights=weights)
        spread = replace(plain, weights=weights.expand(WORLD.tokens, 2))
        got = run(WORLD, lambda _, t=plain: t, "chunked", chunk_tokens=4)
        assert_same(got, run(WORLD, lambda _, t=spread: t, "chunked", chunk_tokens=4), 1e-15)


@pytest.mark.parametrize("mixture", ["probability", "logit", "loss"])
def test_a_mixture_of_one_is_that_teacher_times_its_weight(mixture):
    target = TeacherMixture(targets=(WORLD.target("hidden"),), weights=torch.tensor([0.9995]), mixture=mixture)
    wanted = run(WORLD, lambda _: target, "reference", policy=True)
    assert_same(run(WORLD, lambda _: target, "chunked", policy=True, chunk_tokens=4), wanted)
    wanted = run(WORLD, lambda _: target, "reference", divergence="total_variation")
    assert_same(run(WORLD, lambda _: target, "chunked", divergence="total_variation"), wanted)


def test_a_repeated_id_in_a_top_k_counts_once():
    plain = WORLD.target("top_k")
    ids = torch.cat([plain.ids, plain.ids[:, :2]], -1)
    logp = torch.cat([plain.teacher_logp, plain.teacher_logp[:, :2]], -1)
    twice = TopKTarget(ids=ids, teacher_logp=logp, sampled_logp=plain.sampled_logp)
    for tail in TAILS:
        once = run(WORLD, "top_k", "chunked", tail=tail, chunk_tokens=4)
        assert_same(run(WORLD, lambda _: twice, "chunked", tail=tail, chunk_tokens=4), once)


# --- vocabularies that differ -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", [*CLOSED, {"divergence": "total_variation"}], ids=named)
def test_padding_beyond_the_common_vocabulary_has_no_say(divergence):
    """Of 37 rows, 29 are tokens, said in each of the four ways it can be said."""
    valid = 29
    hidden, weight, bias = WORLD.hidden_states, WORLD.weight, WORLD.bias
    ids = WORLD.response_ids % valid
    teacher = Head(weight=WORLD.teacher_weight, bias=WORLD.teacher_bias)

    def call(rows: int, head: Head, logits: bool = False, **settings):
        leaves = [part.clone().requires_grad_() for part in (hidden, weight[:rows], bias[:rows])]
        target = HiddenTarget(hidden=WORLD.teacher_hidden, head=head)
        if logits:
            target = DenseTarget(logits=WORLD.teacher_logits()[:, : head.valid_vocab])
        out = linear_divergence(
            leaves[0], leaves[1], target, bias=leaves[2], response_ids=ids, chunk_tokens=4, **settings, **divergence
        )
        out.loss.backward()
        found = {"loss": out.loss, **{name: getattr(out, name) for name in OUTPUTS}}
        found |= {"hidden": leaves[0].grad, "weight": leaves[1].grad, "bias": leaves[2].grad}
        return {name: value.detach() for name, value in found.items() if value is not None}

    exact = call(valid, Head(weight=teacher.weight[:valid], bias=teacher.bias[:valid]), impl="reference")
    for impl in ("chunked", "reference"):
        padded = {
            "valid_vocab": call(37, teacher, valid_vocab=valid, impl=impl),
            "head": call(37, replace(teacher, valid_vocab=valid), impl=impl),
            "smaller teacher": call(37, replace(teacher, weight=teacher.weight[:valid], bias=teacher.bias[:valid]), impl=impl),
            "fewer logits": call(37, replace(teacher, valid_vocab=valid), logits=True, impl=impl),
            "smaller student": call(valid, teacher, impl=impl),
        }  # fmt: skip
        for found in padded.values():
            assert not found["weight"][valid:].any() and not found["bias"][valid:].any()
            found["weight"], found["bias"] = found["weight"][:valid], found["bias"][:valid]
            assert_same(found, exact)


# --- gradcheck --------------------------------------------------------------------------------------------------------


class Repeatable(torch.autograd.Function):
    """A fused loss that can be differentiated again and again, as gradcheck does and the loss itself refuses."""

    @staticmethod
    def forward(ctx, loss, *leaves):
        own = [leaf.detach().requires_grad_() for leaf in leaves]
        with torch.enable_grad():
            value = loss(*own)
        ctx.save_for_backward(*torch.autograd.grad(value, own))
        return value.detach()

    @staticmethod
    def backward(ctx, grad):
        return None, *(grad * saved for saved in ctx.saved_tensors)


def checked(kind: str, **settings: object) -> None:
    world = World(3, 2, 5, seed=4, top_k=2)
    target = world.target(kind)
    leaves = [part.clone().requires_grad_() for part in (world.hidden_states, world.weight, world.bias)]
    if settings.pop("policy", False):
        settings["policy"] = world.policy()

    def loss(hidden, weight, bias):
        settings.setdefault("response_ids", world.response_ids)
        out = linear_divergence(hidden, weight, target, bias=bias, token_weights=world.token_weights, **settings)  # pyright: ignore[reportArgumentType]
        return out.loss

    assert torch.autograd.gradcheck(lambda *inputs: Repeatable.apply(loss, *inputs), leaves)


@pytest.mark.parametrize("divergence", DIVERGENCES + ENDS, ids=named)
@pytest.mark.filterwarnings("ignore:generalized_jsd with normalize=False")
def test_the_gradient_is_the_derivative_of_the_loss(divergence):
    for kind in WHOLE:
        checked(kind, **divergence, chunk_tokens=2)
    checked("hidden", **divergence, student_temperature=1.7, teacher_temperature=0.6, distill_weight=0.5)
    checked("dense", **divergence, entropy_bonus=0.3)


@pytest.mark.parametrize("divergence", PARTIAL, ids=named)
@pytest.mark.filterwarnings("ignore:generalized_jsd with normalize=False")
def test_the_gradient_of_a_top_k_is_the_derivative_of_the_loss(divergence):
    for tail in ("bucket", "generalized", "renormalize"):  # tail=sampled holds a probability still
        checked("top_k", **divergence, tail=tail, student_temperature=1.3, entropy_bonus=0.1)


def test_the_gradient_of_k2_and_k3_is_the_derivative_of_the_loss():
    for estimator in SAMPLED[1:]:
        checked("sampled", **estimator)


def test_the_gradient_of_a_clipped_policy_term_is_the_derivative_of_the_loss():
    checked("none", policy=True)
    checked("hidden", policy=True, entropy_bonus=0.1)
    checked("top_k", policy=True, student_temperature=0.8)

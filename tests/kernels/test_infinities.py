"""Tokens that cannot occur: −inf in a bias or in a teacher's logits. They have no probability, no gradient, and give no NaN."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import (
    DIVERGENCES,
    ENDS,
    GRADIENTS,
    SAMPLED,
    TAILS,
    World,
    assert_same,
    named,
    run,
)

from opd.kernels import TeacherMixture, linear_divergence
from opd.types import DenseTarget, TopKTarget

FLOAT32 = torch.float32
NEVER = [2, 7]  # tokens that somebody rules out
EVERY = [*DIVERGENCES, *ENDS]

pytestmark = pytest.mark.filterwarnings("ignore:generalized_jsd with normalize=False")


def world(**settings) -> World:
    return World(11, 5, 19, FLOAT32, **settings)


def ruled_out(student: bool, **settings) -> World:
    """Response tokens are others; `student`: by −inf in its bias."""
    made = world(**settings)
    made.parts["response_ids"] = torch.where(torch.isin(made.response_ids, torch.tensor(NEVER)), 3, made.response_ids)
    if student:
        made.parts["bias"][NEVER] = -torch.inf
    made.parts["old"] = made.student_logp() + 0.1
    return made


def dense(made: World, rows: slice = slice(None)):
    """The teacher's logits, −inf at two tokens of some rows."""

    def target(dtype: torch.dtype) -> DenseTarget:
        logits = made.teacher_logits().float().to(dtype).clone()
        logits[rows, NEVER[0]], logits[rows, NEVER[1]] = -torch.inf, -torch.inf
        return DenseTarget(logits=logits)

    return target


def agree(made: World, kind, **settings) -> dict[str, torch.Tensor]:
    """Both dtypes give the plain version's numbers, infinities in the same places and no NaN."""
    for dtype, tolerance in ((torch.float64, 1e-12), (FLOAT32, 2e-5)):
        wanted = run(made, kind, "reference", dtype, **settings)
        got = run(made, kind, "chunked", dtype, chunk_tokens=4, **settings)
        for name, value in wanted.items():
            assert not value.isnan().any(), name
            assert torch.equal(got[name].isinf(), value.isinf()), name
            got[name], wanted[name] = (part.nan_to_num(nan=9e9, posinf=0.0, neginf=0.0) for part in (got[name], value))
        assert_same(got, wanted, tolerance)
    return got


@pytest.mark.parametrize("divergence", EVERY, ids=named)
def test_a_student_that_cannot_say_two_tokens(divergence):
    made = ruled_out(student=True)
    found = agree(made, "hidden", **divergence, policy=True, entropy_bonus=0.2)
    assert not found["d_weight"][NEVER].any() and not found["d_bias"][NEVER].any()


@pytest.mark.parametrize("divergence", EVERY, ids=named)
def test_a_teacher_that_cannot_say_two_tokens(divergence):
    made = ruled_out(student=False)
    agree(made, dense(made), **divergence, policy=True, entropy_bonus=0.2)
    agree(made, dense(made, slice(1, 8, 3)), **divergence)  # some rows of a chunk, and chunks without any


@pytest.mark.parametrize("divergence", EVERY, ids=named)
def test_two_tokens_that_neither_can_say_might_as_well_not_be_there(divergence):
    made = ruled_out(student=True)
    found = agree(made, dense(made), **divergence)
    kept = [v for v in range(made.vocab) if v not in NEVER]
    smaller = world()
    for name in ("weight", "bias", "teacher_weight", "teacher_bias"):
        smaller.parts[name] = made.parts[name][kept]
    logits = made.teacher_logits()[:, kept].float()
    settings = {"response_ids": None, **divergence}
    wanted = run(smaller, lambda dtype: DenseTarget(logits=logits.to(dtype)), "reference", FLOAT32, **settings)
    for name in ("loss", "per_token", "d_hidden", "student_entropy", "teacher_entropy"):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=2e-6)
    for name in ("d_weight", "d_bias"):
        torch.testing.assert_close(found[name][kept], wanted[name], rtol=1e-4, atol=2e-6)


def test_reverse_kl_is_infinite_where_the_teacher_cannot_say_what_the_student_can():
    made = ruled_out(student=False)
    out = run(made, dense(made, slice(0, 3)), "chunked", FLOAT32, chunk_tokens=4)
    assert torch.equal(out["per_token"].isinf(), torch.arange(11) < 3)
    assert out["loss"] == math.inf
    for name in GRADIENTS:
        assert out[name].isfinite().all()


def test_an_infinite_token_can_be_masked_away():
    made = ruled_out(student=False)
    weights = made.token_weights * (torch.arange(11) >= 3)
    out = run(made, dense(made, slice(0, 3)), "chunked", FLOAT32, chunk_tokens=4, token_weights=weights.float())
    wanted = run(made, "dense", "reference", FLOAT32, token_weights=weights.float())
    torch.testing.assert_close(out["loss"], wanted["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(out["d_weight"], wanted["d_weight"], rtol=1e-4, atol=1e-6)


def test_forward_kl_is_infinite_where_the_student_cannot_say_what_the_teacher_can():
    out = run(ruled_out(student=True), "hidden", "chunked", FLOAT32, divergence="forward_kl", chunk_tokens=4)
    assert bool((out["per_token"] == math.inf).all())
    for name in GRADIENTS:
        assert out[name].isfinite().all()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "generalized_jsd"])
def test_a_student_that_cannot_say_two_tokens_under_a_top_k(divergence, tail):
    agree(ruled_out(student=True), "top_k", divergence=divergence, tail=tail, policy=True, entropy_bonus=0.1)


def test_a_top_k_that_runs_out_of_tokens():
    """A teacher with two likely tokens fills its top 4 with −inf."""
    made = world()
    plain = made.target("top_k")
    logp = plain.teacher_logp.clone()
    logp[:, 2:] = -torch.inf

    def target(dtype: torch.dtype) -> TopKTarget:
        return TopKTarget(ids=plain.ids, teacher_logp=logp.to(dtype), sampled_logp=plain.sampled_logp.to(dtype))

    for divergence in ("reverse_kl", "forward_kl", "generalized_jsd", "skew_reverse_kl", "total_variation"):
        for tail in TAILS:
            agree(made, target, divergence=divergence, tail=tail)


def test_a_student_that_cannot_say_two_tokens_under_every_other_target():
    made = ruled_out(student=True)
    for settings in SAMPLED:
        agree(made, "sampled", **settings, policy=True, entropy_bonus=0.1)
    agree(made, "none", policy=True, entropy_bonus=0.1)


@pytest.mark.parametrize("divergence", EVERY, ids=named)
@pytest.mark.parametrize("mixture", ["probability", "logit", "loss"])
def test_mixed_teachers_that_cannot_say_some_tokens(mixture, divergence):
    """The same two tokens, different ones, and a teacher of weight 0 whose word is infinite."""
    made = ruled_out(student=False)
    shares = torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    weights = shares[torch.arange(11) % 4]

    def mixed(rows_of_second: slice):
        def target(dtype: torch.dtype) -> TeacherMixture:
            second = dense(made, rows_of_second)(dtype).logits.flip(-1)
            return TeacherMixture(
                targets=(dense(made)(dtype), DenseTarget(logits=second)), weights=weights.to(dtype), mixture=mixture
            )

        return target

    made.parts["response_ids"] = torch.full((11,), 4)  # which both can say
    agree(made, mixed(slice(0, 0)), **divergence)
    agree(made, mixed(slice(None)), **divergence, policy=True, entropy_bonus=0.1)

    def alike(dtype: torch.dtype) -> TeacherMixture:
        return TeacherMixture(targets=(dense(made)(dtype),) * 2, weights=weights.to(dtype), mixture=mixture)

    agree(made, alike, **divergence)


def test_an_old_log_prob_of_minus_infinity_is_a_ratio_to_1():
    made = world()
    old = made.old.clone()
    old[[1, 5]] = -torch.inf
    for kind in ("hidden", "none", "top_k"):
        for dtype in (torch.float64, FLOAT32):
            policy = made.policy(dtype, old_log_prob=old.to(dtype))
            wanted, got = (run(made, kind, impl, dtype, policy=policy) for impl in ("reference", "chunked"))
            assert_same(got, wanted, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("impl", ["chunked", "minimal"])
@pytest.mark.parametrize("kind", ["hidden", "top_k", "none"])
def test_a_response_that_cannot_occur_has_log_prob_minus_infinity(kind, impl):
    """And the policy gradient of the plain loss, whatever stands for −inf inside."""
    made = world()
    made.parts["bias"][4] = -torch.inf
    made.parts["response_ids"] = torch.where(torch.isin(made.response_ids, torch.tensor([4])), 3, made.response_ids)
    made.parts["response_ids"][1] = 4
    for dtype, tolerance in ((torch.float64, 1e-12), (FLOAT32, 2e-5)):
        target = made.target(kind, dtype)
        if isinstance(target, TopKTarget):
            target.ids[2, 3] = 4
        settings = {
            "policy": made.policy(dtype, old_log_prob=torch.full((11,), -3.0, dtype=dtype)),
            "entropy_bonus": 0.1,
        }
        wanted, got = (run(made, lambda _: target, one, dtype, **settings) for one in ("reference", impl))  # noqa: B023
        for found in (got, wanted):
            assert found["student_logp"].isinf().tolist() == [i == 1 for i in range(11)]
            found |= {name: value.nan_to_num(posinf=7e3, neginf=-7e3) for name, value in found.items()}
        assert_same(got, wanted, tolerance)


def test_a_whole_vocabulary_ruled_out_but_one_token_has_no_entropy_and_no_gradient():
    bias = torch.full((5,), -torch.inf)
    bias[3] = 0.0
    hidden, weight = torch.randn(2, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    for target in (DenseTarget(logits=torch.randn(2, 5)), None):
        settings = {"entropy_bonus": 0.5} if target is None else {}
        out = linear_divergence(hidden, weight, target, bias=bias, response_ids=torch.tensor([3, 3]), **settings)
        out.loss.backward()
        assert not out.student_entropy.any() and not out.student_logp.any()
        assert not hidden.grad.any() and not weight.grad.any()

"""What the trainer calls: any Objective from hidden states, with the numbers of `Objective.per_token` on whole logits."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from kernel_cases import Products, World, assert_same

from opd.errors import ObjectiveError
from opd.kernels import linear_objective
from opd.losses import Objective
from opd.types import DenseTarget, HiddenTarget, TopKTarget

WORLD = World(17, 5, 31, top_k=6)
EOS = (4, 30, 99)  # one of them is not in the vocabulary
SEQUENCES = torch.tensor([0] * 6 + [1] * 1 + [2] * 10)

FULL = [
    Objective(),
    Objective(divergence="forward_kl", student_temperature=1.5, teacher_temperature=1.5, scale_by_t2=True),
    Objective(divergence="generalized_jsd", beta=0.2),
    Objective(divergence="skew_reverse_kl", beta=0.4, teacher_temperature=0.7),
    Objective(divergence="total_variation"),
    Objective(divergence="alpha_beta_divergence", alpha=0.3, beta=0.8),
    Objective(divergence="forward_reverse_kl", alpha=0.3),
    Objective(teacher_logp_floor=-3.0),
]
PARTIAL = [
    Objective(support="teacher_top_k", top_k=4),
    Objective(support="teacher_top_k", top_k=6, tail="generalized", divergence="forward_kl", student_temperature=1.3),
    Objective(support="teacher_top_k", top_k=5, tail="renormalize"),
    Objective(support="teacher_top_k", top_k=4, tail="sampled"),
    Objective(support="teacher_top_k", top_k=4, teacher_logp_floor=-3.0),
    Objective(support="teacher_top_k", top_k=3, include_sampled=True, student_temperature=1.2),
]
CHOSEN = [
    Objective(support="student_top_k", top_k=4),
    Objective(support="union", top_k=3, always_include=(4,), include_sampled=True),
    Objective(support="teacher_top_k", top_k=3, always_include=(4, 7), tail="generalized"),
]
SAMPLED = [
    Objective(support="sampled", estimator="k1", delivery="advantage"),
    Objective(support="sampled", estimator="k1", delivery="advantage", clip_range=0.2),
    Objective(support="sampled", estimator="k1", delivery="advantage", teacher_logp_floor=-3.0),
    Objective(support="sampled", estimator="k2", student_temperature=1.4),
    Objective(support="sampled", estimator="k3", divergence="forward_kl"),
    Objective(support="sampled", estimator="k1", delivery="advantage", discount=0.9),
    Objective(support="sampled", estimator="k1", delivery="advantage", discount=1.0, clip_range=0.2),
]
BASELINES = [
    Objective(support="sampled", estimator="k1", delivery="advantage", baseline="value"),
    Objective(support="sampled", estimator="k1", delivery="advantage", baseline="value", discount=0.5),
]
FITTING = [
    *(("hidden", o) for o in FULL + PARTIAL + CHOSEN + SAMPLED + BASELINES),
    *(("dense", o) for o in FULL + PARTIAL + CHOSEN + SAMPLED + BASELINES),
    *(("top_k", o) for o in PARTIAL + SAMPLED + BASELINES),
    *(("sampled", o) for o in SAMPLED),
]


def described(value: object) -> str:
    if isinstance(value, Objective):
        plain = Objective()
        return "+".join(f"{k}={v}" for k, v in vars(value).items() if v != getattr(plain, k)) or "default"
    return str(value)


def given(target: Any, objective: Objective, masked: tuple[int, ...], valid: int | None) -> dict[str, torch.Tensor]:
    """Through whole logits and autograd."""
    hidden, weight, bias = (p.clone().requires_grad_() for p in (WORLD.hidden_states, WORLD.weight, WORLD.bias))

    def cut(logits: torch.Tensor) -> torch.Tensor:
        logits = logits[:, :valid]
        return logits.index_fill(-1, torch.tensor(masked, dtype=torch.long), -torch.inf) if masked else logits

    if isinstance(target, HiddenTarget):
        target = DenseTarget(logits=WORLD.teacher_logits())
    if isinstance(target, DenseTarget):
        target = DenseTarget(logits=cut(target.logits))
    logits = cut(hidden @ weight.T + bias)
    out = objective.per_token(
        logits, target, response_ids(valid), sampler_logp=sampler_logp(valid), sequence_index=SEQUENCES
    )
    total = torch.where(WORLD.token_weights == 0, 0.0, out.loss * WORLD.token_weights).sum()
    total.backward()
    eos = [i for i in EOS if i < logits.shape[-1]]
    metrics = {**out.metrics, "eos_prob": logits.softmax(-1)[:, eos].sum(-1)}
    grads = {"d_hidden": hidden.grad, "d_weight": weight.grad, "d_bias": bias.grad}
    return {"sum": total, "loss": out.loss, **metrics, **grads}


def response_ids(valid: int | None) -> torch.Tensor:
    ids = WORLD.response_ids % (valid or WORLD.vocab)
    return torch.where(torch.isin(ids, torch.tensor([3, 11])), 12, ids)


@cache
def sampler_logp(valid: int | None) -> torch.Tensor:
    """Log-probs near the student's own."""
    drawn = WORLD.logits().log_softmax(-1).gather(-1, response_ids(valid)[:, None]).squeeze(-1)
    return drawn + 0.2 * WORLD.advantages


def fused(target: Any, objective: Objective, **settings: Any) -> dict[str, torch.Tensor]:
    hidden, weight, bias = (p.clone().requires_grad_() for p in (WORLD.hidden_states, WORLD.weight, WORLD.bias))
    total, loss, metrics = linear_objective(
        hidden,
        weight,
        target,
        response_ids(settings.get("valid_vocab")),
        objective,
        token_weights=WORLD.token_weights,
        bias=bias,
        sampler_logp=sampler_logp(settings.get("valid_vocab")),
        sequence_index=SEQUENCES,
        eos_ids=EOS,
        **settings,
    )
    total.backward()
    assert not loss.requires_grad and not any(value.requires_grad for value in metrics.values())
    grads = {"d_hidden": hidden.grad, "d_weight": weight.grad, "d_bias": bias.grad}
    return {"sum": total.detach(), "loss": loss, **metrics, **grads}


def assert_alike(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert_same(found, {name: value.detach() for name, value in wanted.items()}, 1e-11)


def target_of(kind: str, valid: int | None) -> Any:
    """The teacher's view; of a top-k, only tokens that both have and that nobody masks."""
    target = WORLD.target(kind)
    if not isinstance(target, TopKTarget):
        return target
    logits = WORLD.teacher_logits()
    logits[:, [3, 11]] = -torch.inf
    logp = logits[:, :valid].log_softmax(-1)
    best = logp.topk(6, -1)
    drawn = logp.gather(-1, response_ids(valid)[:, None]).squeeze(-1)
    return TopKTarget(ids=best.indices, teacher_logp=best.values, sampled_logp=drawn)


@pytest.mark.parametrize(("kind", "objective"), FITTING, ids=described)
def test_the_numbers_are_those_of_the_objective_on_whole_logits(kind, objective):
    for masked, valid in (((), None), ((3, 11), 24)):
        target = target_of(kind, valid)
        wanted = given(target, objective, masked, valid)
        for impl in ("chunked", "reference"):
            for chunk in (4, None):
                settings = {"masked_ids": masked, "valid_vocab": valid, "impl": impl, "chunk_tokens": chunk}
                assert_alike(fused(target, objective, **settings), wanted)


@pytest.mark.parametrize("kind", ["hidden", "top_k", "sampled"])
def test_tokens_of_weight_0_are_still_reported(kind):
    objective = {"hidden": FULL[0], "top_k": PARTIAL[0], "sampled": SAMPLED[0]}[kind]
    hidden, weight = WORLD.hidden_states.clone().requires_grad_(), WORLD.weight.clone().requires_grad_()
    weights = torch.where(torch.arange(17) < 9, WORLD.token_weights, 0.0)
    target = target_of(kind, None)
    ids = response_ids(None)
    for impl in ("chunked", "reference"):
        some = linear_objective(hidden, weight, target, ids, objective, token_weights=weights, impl=impl)
        every = linear_objective(hidden, weight, target, ids, objective, token_weights=WORLD.token_weights, impl=impl)
        torch.testing.assert_close(some[1], every[1], rtol=0, atol=1e-12)
        for name, value in every[2].items():
            torch.testing.assert_close(some[2][name], value, rtol=0, atol=1e-12)
        (grad,) = torch.autograd.grad(some[0], hidden)
        assert not grad[9:].any() and grad[:9].any()


def test_a_token_of_weight_0_whose_loss_is_infinite_spoils_neither_sum_nor_gradient():
    logits = WORLD.teacher_logits()
    logits[2, 7] = -torch.inf
    weights = torch.where(torch.arange(17) == 2, 0.0, WORLD.token_weights)
    hidden = WORLD.hidden_states.clone().requires_grad_()
    for impl in ("chunked", "reference"):
        total, loss, metrics = linear_objective(
            hidden,
            WORLD.weight,
            DenseTarget(logits=logits),
            response_ids(None),
            FULL[0],
            token_weights=weights,
            impl=impl,
        )
        assert loss[2] == torch.inf and metrics["reverse_kl"][2] == torch.inf and total.isfinite()
        (grad,) = torch.autograd.grad(total, hidden)
        assert grad.isfinite().all() and not grad[2].any()


@pytest.mark.parametrize("kind", ["hidden", "probability", "logit", "loss", "top_k", "sampled"])
@pytest.mark.parametrize("clip_range", [None, (0.1, 0.3)])
def test_a_policy_term_adds_its_loss_and_its_gradient(kind, clip_range):
    """λ · distillation + policy is the sum of the two calls that compute one each; and every implementation agrees."""
    objective = {"top_k": PARTIAL[0], "sampled": SAMPLED[0]}.get(kind, FULL[0])
    target, policy = WORLD.target(kind), WORLD.policy(clip_range=clip_range)
    alone = fused(target, objective, impl="reference")
    rewarded = fused(None, objective, impl="reference", policy=policy)
    for impl in ("chunked", "reference"):
        for chunk in (4, None):
            both = fused(target, objective, impl=impl, chunk_tokens=chunk, policy=policy, distill_weight=0.25)
            for name in ("sum", "loss", "d_hidden", "d_weight", "d_bias"):
                torch.testing.assert_close(
                    both[name], 0.25 * alone[name] + rewarded[name], rtol=0, atol=1e-10, msg=name
                )
            for name in ("policy_loss", "clipped", "student_entropy", "student_logp", "eos_prob"):
                torch.testing.assert_close(both[name], rewarded[name], rtol=0, atol=1e-10, check_dtype=False)
            for name in alone.keys() - {"sum", "loss", "d_hidden", "d_weight", "d_bias"}:
                torch.testing.assert_close(both[name], alone[name], rtol=0, atol=1e-10, check_dtype=False)


@pytest.mark.parametrize("kind", ["probability", "logit", "loss"])
@pytest.mark.parametrize("objective", [FULL[0], FULL[1], FULL[2], FULL[4], CHOSEN[0], SAMPLED[3]], ids=described)
def test_the_diagnostics_of_several_teachers_are_the_same_from_every_implementation(kind, objective):
    for masked in ((), (3, 11)):
        wanted = fused(WORLD.target(kind), objective, impl="reference", masked_ids=masked)
        assert {"reverse_kl", "forward_kl", "teacher_logp", "overlap", "eos_prob"} <= wanted.keys()
        for chunk in (4, None):
            settings = {"masked_ids": masked, "impl": "chunked", "chunk_tokens": chunk}
            assert_alike(fused(WORLD.target(kind), objective, **settings), wanted)


def test_without_a_teacher_only_the_temperature_of_the_objective_is_read():
    policy = WORLD.policy()
    for impl in ("chunked", "reference"):
        plain = fused(None, Objective(), impl=impl, policy=policy)
        for objective in (FULL[4], CHOSEN[0], SAMPLED[5]):
            other = fused(None, objective, impl=impl, policy=policy)
            assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_returns_and_a_policy_term_do_not_share_a_pass():
    for impl in ("chunked", "reference"):
        with pytest.raises(ObjectiveError, match=r"discount=0\.9 makes the distillation a policy gradient"):
            fused(WORLD.target("sampled"), SAMPLED[5], impl=impl, policy=WORLD.policy())


@pytest.mark.parametrize(
    ("kind", "objective", "products"),
    [("hidden", FULL[0], 4), ("hidden", FULL[1], 4), ("hidden", FULL[4], 4), ("dense", FULL[0], 3), ("top_k", PARTIAL[0], 3),
     ("sampled", SAMPLED[0], 3), ("sampled", SAMPLED[5], 4)],
    ids=described,
)  # fmt: skip
def test_diagnostics_cost_no_product(kind, objective, products):
    target, _ = target_of(kind, None), sampler_logp(None)
    with Products() as seen:
        fused(target, objective)
    assert seen.count == products


def test_only_the_sum_can_be_differentiated():
    hidden = WORLD.hidden_states.clone().requires_grad_()
    total, loss, metrics = linear_objective(
        hidden, WORLD.weight, WORLD.target("hidden"), response_ids(None), FULL[0], token_weights=WORLD.token_weights
    )
    assert total.requires_grad and not loss.requires_grad
    assert not any(value.requires_grad for value in metrics.values())


def test_an_objective_that_the_target_cannot_feed_is_refused():
    for kind, objective, message in (
        ("top_k", FULL[0], "needs every vocabulary entry"),
        ("top_k", CHOSEN[0], "tokens that the student chooses"),
        ("sampled", FULL[0], "needs every vocabulary entry"),
        ("sampled", PARTIAL[0], "needs teacher log-probs of its top-4"),
        ("sampled", BASELINES[0], "baseline=value"),
    ):
        for impl in ("chunked", "reference"):
            with pytest.raises(ObjectiveError, match=message):
                fused(target_of(kind, None), objective, impl=impl)
    with pytest.raises(ObjectiveError, match="pass sequence_index"):
        linear_objective(
            WORLD.hidden_states,
            WORLD.weight,
            WORLD.target("sampled"),
            response_ids(None),
            SAMPLED[5],
            token_weights=WORLD.token_weights,
        )


@pytest.mark.parametrize("kind", ["hidden", "dense", "top_k", "sampled"])
@pytest.mark.parametrize(
    ("offset", "teacher_offset"), [(0.0, 0.0), (60.0, 60.0), (-150.0, -150.0), (60.0, 0.0), (0.0, -150.0)]
)
def test_diagnostics_do_not_see_a_common_offset(kind, offset, teacher_offset):
    """In float32, where e^60 squared and e^-150 are no numbers: those of float64, overlap and all."""
    world = World(17, 5, 31, torch.float32, offset=offset, teacher_offset=teacher_offset)
    objective = {"hidden": FULL[0], "dense": FULL[2], "top_k": PARTIAL[0], "sampled": SAMPLED[0]}[kind]

    def call(dtype: torch.dtype, impl: str) -> dict[str, torch.Tensor]:
        hidden = world.hidden_states.to(dtype).requires_grad_()
        total, loss, metrics = linear_objective(
            hidden, world.weight.to(dtype), world.target(kind, dtype), world.response_ids, objective,
            token_weights=world.token_weights.to(dtype), bias=world.bias.to(dtype), eos_ids=EOS, impl=impl, chunk_tokens=4,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(total, hidden)
        return {"sum": total.detach(), "loss": loss, "d_hidden": grad, **metrics}

    assert_same(call(torch.float32, "chunked"), call(torch.float64, "reference"), 1e-4)

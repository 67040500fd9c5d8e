"""Reinforcement learning on the rows of a distillation loss: the clipped surrogate, hybrids, the entropy bonus, and what they expect."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import GRADIENTS, TAILS, WAYS, WHOLE, World, assert_same, run

from opd.kernels import PolicyTerm, linear_divergence
from opd.losses import policy_gradient_loss, reverse_kl
from opd.types import DenseTarget, SampledTarget, TopKTarget

WORLD = World(40, 6, 29)
CLIPS = (None, 0.2, (0.2, 0.3), (0.5, 0.01), (1.5, 0.2))

# Row by row what a clipped ratio can meet: ratios at, inside and beyond both bounds, under advantages of both signs and 0.
RATIOS = [0.5, 0.79, 0.8, 0.81, 1.0, 1.29, 1.3, 1.31, 4.0, 1e-30]
ADVANTAGES = [1.5, -1.5, 0.0, 0.3]


def meetings() -> tuple[World, PolicyTerm]:
    world = World(len(RATIOS) * len(ADVANTAGES), 6, 29)
    ratios = torch.tensor(RATIOS, dtype=torch.float64).repeat(len(ADVANTAGES))
    policy = PolicyTerm(
        advantages=torch.tensor(ADVANTAGES, dtype=torch.float64).repeat_interleave(len(RATIOS)),
        old_log_prob=world.student_logp() - ratios.log(),
        clip_range=(0.2, 0.3),
    )
    return world, policy


def surrogate(world: World, policy: PolicyTerm, clip) -> dict[str, torch.Tensor]:
    """The weighted surrogate through `losses` and autograd on whole logits."""
    hidden, weight, bias = (part.clone().requires_grad_() for part in (world.hidden_states, world.weight, world.bias))
    logp = (hidden @ weight.T + bias).log_softmax(-1).gather(-1, world.response_ids[:, None]).squeeze(-1)
    loss = policy.weight * policy_gradient_loss(logp, policy.advantages, policy.old_log_prob, clip)
    if policy.importance_weights is not None:
        loss = policy.importance_weights * loss
    total = (loss * world.token_weights).sum()
    grads = torch.autograd.grad(total, [hidden, weight, bias])
    return {"loss": total.detach(), "policy_loss": loss.detach(), **dict(zip(GRADIENTS, grads, strict=True))}


def alike(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], atol: float = 1e-12) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_the_policy_term_is_the_surrogate_of_losses(way, clip):
    for changes in ({}, {"importance_weights": None}, {"old_log_prob": None}, {"weight": -2.0}):
        policy = WORLD.policy(clip_range=clip, **changes)
        found = run(WORLD, "none", way, policy=policy, chunk_tokens=7)
        alike(found, surrogate(WORLD, policy, clip))


@pytest.mark.parametrize("kind", ["none", "hidden", "top_k"])
@pytest.mark.parametrize("way", WAYS)
def test_with_likelihood_the_term_is_the_cross_entropy_with_the_response_tokens(way, kind):
    """A row of weight 0 among them has none, in value and gradient."""
    weights = torch.where(torch.arange(WORLD.tokens) % 3 == 0, 0.0, WORLD.advantages.abs())
    policy = PolicyTerm(advantages=weights, weight=0.7, likelihood=True)
    settings = {"tail": "bucket"} if kind == "top_k" else {}
    found = run(WORLD, kind, way, policy=policy, chunk_tokens=7, **settings)
    plain = None if kind == "none" else run(WORLD, kind, way, chunk_tokens=7, **settings)

    hidden, weight, bias = (part.clone().requires_grad_() for part in (WORLD.hidden_states, WORLD.weight, WORLD.bias))
    wrong = torch.nn.functional.cross_entropy(hidden @ weight.T + bias, WORLD.response_ids, reduction="none")
    total = (WORLD.token_weights * 0.7 * weights * wrong).sum()
    grads = dict(zip(GRADIENTS, torch.autograd.grad(total, [hidden, weight, bias]), strict=True))
    wanted = {"loss": total.detach(), **grads}
    if plain is not None:
        wanted = {name: value + plain[name] for name, value in wanted.items()}
    alike(found, {**wanted, "policy_loss": 0.7 * weights * wrong.detach(), "clipped": torch.zeros_like(weights)})


@pytest.mark.parametrize("way", WAYS)
def test_with_likelihood_a_token_of_weight_0_may_have_no_probability(way):
    world = World(40, 6, 29)
    impossible = int(world.response_ids[0])
    world.parts["bias"] = world.bias.index_fill(0, world.response_ids[:1], -math.inf)
    weights = torch.where(world.response_ids == impossible, 0.0, 1.0).double()
    found = run(world, "none", way, policy=PolicyTerm(advantages=weights, likelihood=True), chunk_tokens=7)
    assert bool(found["policy_loss"].isfinite().all()) and float(found["policy_loss"][0]) == 0.0
    assert all(bool(found[name].isfinite().all()) for name in ("loss", *GRADIENTS))


@pytest.mark.parametrize("way", WAYS)
def test_the_policy_term_at_its_bounds_is_the_surrogate_of_losses(way):
    """Ratios set from logarithms sit a rounding on either side of a bound, so both sides of it are met in every advantage."""
    world, policy = meetings()
    found = run(world, "none", way, policy=policy)
    wanted = surrogate(world, policy, (0.2, 0.3))
    alike({k: found[k] for k in ("loss", "policy_loss")}, {k: wanted[k] for k in ("loss", "policy_loss")})
    inside = [abs(r - 0.8) > 1e-9 and abs(r - 1.3) > 1e-9 for r in RATIOS] * len(ADVANTAGES)
    rows = torch.tensor(inside)
    torch.testing.assert_close(found["d_hidden"][rows], wanted["d_hidden"][rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize("low_advantage", [-1.0, 1.0])
def test_exactly_at_a_bound_the_gradient_is_that_of_the_unclipped_ratio(low_advantage):
    """Half a token's probability against 1 and ¼: the ratios ½ and 2 are exact, and so are the bounds."""
    weight = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)  # p = ½
    hidden = torch.ones(2, 1, dtype=torch.float64)
    old = torch.tensor([1.0, 0.25], dtype=torch.float64).log()
    advantages = torch.tensor([low_advantage, -low_advantage], dtype=torch.float64)
    ids = torch.zeros(2, dtype=torch.long)
    for impl in ("reference", "chunked"):
        policy = PolicyTerm(advantages=advantages, old_log_prob=old, clip_range=(0.5, 1.0))
        weight.grad = None
        out = linear_divergence(hidden, weight, None, policy=policy, response_ids=ids, impl=impl)
        out.loss.backward()
        assert out.clipped.tolist() == [0.0, 0.0]
        slope = -(0.5 * low_advantage - 2.0 * low_advantage) * 0.5
        assert weight.grad.flatten().tolist() == pytest.approx([slope, -slope], abs=1e-15)


def test_clipped_says_where_the_gradient_is_cut():
    world, policy = meetings()
    for impl in ("reference", "chunked"):
        found = run(world, "none", impl, policy=policy, token_weights=torch.ones(world.tokens, dtype=torch.float64))
        for row, (advantage, ratio) in enumerate((a, r) for a in ADVANTAGES for r in RATIOS):
            if advantage == 0 or min(abs(ratio - 0.8), abs(ratio - 1.3)) < 1e-9:
                continue
            cut = ratio > 1.3 if advantage > 0 else ratio < 0.8
            assert found["clipped"][row] == float(cut)
            assert bool(found["d_hidden"][row].any()) != cut


def test_a_huge_ratio_is_held_at_e_to_the_20_without_a_gradient():
    world = World(2, 3, 5)
    old = world.student_logp() - torch.tensor([25.0, 19.0], dtype=torch.float64)
    policy = PolicyTerm(advantages=-torch.ones(2, dtype=torch.float64), old_log_prob=old)
    wanted = surrogate(world, policy, None)
    for impl in ("reference", "chunked"):
        found = run(world, "none", impl, policy=policy)
        assert found["policy_loss"][0].item() == pytest.approx(math.exp(20))
        assert not found["d_hidden"][0].any() and found["d_hidden"][1].any()
        torch.testing.assert_close(found["d_weight"], wanted["d_weight"], rtol=1e-12, atol=0)


def test_without_old_log_probs_the_term_is_the_plain_policy_gradient():
    advantages = WORLD.advantages
    found = run(WORLD, "none", "chunked", policy=PolicyTerm(advantages=advantages))
    torch.testing.assert_close(found["policy_loss"], -advantages, rtol=1e-12, atol=1e-12)
    assert not found["clipped"].any()
    hidden = WORLD.hidden_states.clone().requires_grad_()
    logp = (hidden @ WORLD.weight.T + WORLD.bias).log_softmax(-1).gather(-1, WORLD.response_ids[:, None]).squeeze(-1)
    (-(WORLD.token_weights * advantages * logp).sum()).backward()
    torch.testing.assert_close(found["d_hidden"], hidden.grad, rtol=0, atol=1e-13)


# --- hybrids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*WHOLE, "top_k", "sampled"])
def test_a_hybrid_is_the_sum_of_its_parts(kind):
    for impl in ("reference", "chunked"):
        for divergence in ("reverse_kl", "forward_kl", "skew_forward_kl", "total_variation"):
            if kind == "sampled" and divergence != "reverse_kl":
                continue
            parts = [
                run(WORLD, kind, impl, divergence=divergence, distill_weight=0.4),
                run(WORLD, "none", impl, policy=True),
                run(WORLD, "none", impl, entropy_bonus=0.15),
            ]
            settings = {"divergence": divergence, "distill_weight": 0.4, "policy": True, "entropy_bonus": 0.15}
            found = run(WORLD, kind, impl, chunk_tokens=9, **settings)
            alike(found, {name: sum(part[name] for part in parts) for name in ("loss", *GRADIENTS)})


def test_the_tails_of_a_top_k_ride_with_a_policy_term():
    for tail in TAILS:
        parts = [run(WORLD, "top_k", "chunked", tail=tail), run(WORLD, "none", "chunked", policy=True)]
        found = run(WORLD, "top_k", "chunked", tail=tail, policy=True)
        alike(found, {name: sum(part[name] for part in parts) for name in ("loss", *GRADIENTS)})


def test_distill_weight_multiplies_the_divergence_only():
    one = run(WORLD, "hidden", "chunked")
    for share in (0.25, 2.0, -1.0):
        found = run(WORLD, "hidden", "chunked", distill_weight=share)
        alike(found, {name: share * one[name] for name in ("loss", *GRADIENTS)})
        alike(found, {"per_token": one["per_token"]})


def test_a_policy_weight_of_0_is_pure_distillation():
    wanted = run(WORLD, "hidden", "chunked")
    found = run(WORLD, "hidden", "chunked", policy=WORLD.policy(weight=0.0))
    assert not found.pop("policy_loss").any()
    del found["clipped"]
    assert_same(found, wanted)


def test_without_a_teacher_the_divergence_is_0():
    found = run(WORLD, "none", "chunked", policy=True)
    assert not found["per_token"].any() and "teacher_entropy" not in found


# --- the entropy bonus ------------------------------------------------------------------------------------------------


def test_a_step_along_the_entropy_bonus_raises_the_entropy():
    for kind in ("none", "hidden"):
        settings = {"distill_weight": 1e-9} if kind == "hidden" else {}
        for divergence in ("reverse_kl", "forward_kl", "generalized_jsd") if kind == "hidden" else ("reverse_kl",):
            found = run(WORLD, kind, "chunked", entropy_bonus=1.0, divergence=divergence, **settings)
            after = World(40, 6, 29)
            after.parts["weight"] = after.weight - 1e-3 * found["d_weight"]
            entropy = run(after, "none", "reference", entropy_bonus=1.0)["student_entropy"]
            weights = WORLD.token_weights
            assert (entropy * weights).sum() > (found["student_entropy"] * weights).sum() + 1e-4


def test_the_entropy_bonus_at_the_uniform_distribution_has_no_gradient():
    hidden, weight = torch.randn(4, 3), torch.zeros(7, 3, requires_grad=True)
    out = linear_divergence(hidden, weight, None, entropy_bonus=0.7)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-0.7 * 4 * math.log(7))
    assert weight.grad.abs().max() < 1e-6


# --- expectations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_in_expectation_k1_as_an_advantage_is_the_gradient_of_reverse_kl(way):
    """Every token of a vocabulary of 50, weighted by the student's probability of drawing it."""
    vocab, generator = 50, torch.Generator().manual_seed(3)
    hidden = torch.randn(1, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, 8, generator=generator, dtype=torch.float64)
    teacher = torch.randn(1, vocab, generator=generator, dtype=torch.float64)
    p, logq = (hidden @ weight.T).softmax(-1).squeeze(0), teacher.log_softmax(-1).squeeze(0)

    def gradients(rows: int, target, **settings) -> list[torch.Tensor]:
        leaves = [hidden.expand(rows, -1).clone().requires_grad_(), weight.clone().requires_grad_()]
        linear_divergence(leaves[0], leaves[1], target, **settings, **WAYS[way]).loss.backward()
        return [leaves[0].grad.sum(0), leaves[1].grad]

    exact = gradients(1, DenseTarget(logits=teacher))
    every = {"response_ids": torch.arange(vocab), "token_weights": p}
    for estimator in ("k1", "k2"):
        drawn = gradients(vocab, SampledTarget(teacher_logp=logq), estimator=estimator, **every)
        for found, wanted in zip(drawn, exact, strict=True):
            assert (found - wanted).norm() <= 1e-12 * wanted.norm()
    forward = gradients(1, DenseTarget(logits=teacher), divergence="forward_kl")
    drawn = gradients(vocab, SampledTarget(teacher_logp=logq), estimator="k3", divergence="forward_kl", **every)
    for found, wanted in zip(drawn, forward, strict=True):
        assert (found - wanted).norm() <= 1e-12 * wanted.norm()


def test_in_expectation_a_sampled_tail_is_the_gradient_of_reverse_kl():
    vocab, k, generator = 50, 6, torch.Generator().manual_seed(3)
    hidden = torch.randn(1, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, 8, generator=generator, dtype=torch.float64)
    logq = torch.randn(1, vocab, generator=generator, dtype=torch.float64).log_softmax(-1)
    world = World(vocab, 8, vocab)
    world.parts["hidden"], world.parts["weight"] = hidden.expand(vocab, -1).clone(), weight
    world.parts["response_ids"] = torch.arange(vocab)
    p = (hidden @ weight.T).softmax(-1).squeeze(0)
    best = logq.topk(k, -1)
    target = TopKTarget(
        ids=best.indices.expand(vocab, -1), teacher_logp=best.values.expand(vocab, -1), sampled_logp=logq.squeeze(0)
    )
    found = run(world, lambda _: target, "chunked", tail="sampled", token_weights=p, bias=False)
    wanted = run(world, lambda _: DenseTarget(logits=logq.expand(vocab, -1)), "chunked", token_weights=p, bias=False)
    assert (found["d_weight"] - wanted["d_weight"]).norm() <= 1e-12 * wanted["d_weight"].norm()
    assert found["loss"].item() == pytest.approx(wanted["loss"].item(), rel=1e-12)
    exact = reverse_kl((hidden @ weight.T).log_softmax(-1), logq).item()
    assert wanted["loss"].item() == pytest.approx(exact, rel=1e-12)


def test_a_reward_that_nearly_cancels_a_top_k_keeps_its_digits():
    """A row is then hardly a multiple of p, and that multiple is no divisor: over sums of logits of 40 it would leave float32's range."""
    world = World(7, 6, 29, torch.float32, offset=40.0)
    settings = {"token_weights": torch.full((7,), 1e-7), "distill_weight": 1e-10, "divergence": "generalized_jsd"}
    wide = settings | {"token_weights": settings["token_weights"].double()}
    zeros = torch.zeros(7, dtype=torch.float64)

    def biases(advantages: torch.Tensor) -> torch.Tensor:
        """What each token adds to Σ_v ∂loss/∂z_v p_v⁻¹ at a token far from its top k: the multiple of p, over its weight."""
        found = []
        for token in range(7):
            one = zeros.index_fill(0, torch.tensor([token]), 1e-6)
            policy = PolicyTerm(advantages=advantages)
            slope = run(world, "top_k", "reference", policy=policy, **(wide | {"token_weights": one}))["d_bias"]
            p = world.logits().softmax(-1)[token]
            known = torch.cat([world.target("top_k").ids[token], world.response_ids[token : token + 1]])
            outside = next(v for v in range(29) if v not in known)
            found.append(-slope[outside] / p[outside] / 1e-6)
        return torch.stack(found)

    cancelling = biases(zeros)  # the policy term adds −A to each multiple
    policy = PolicyTerm(advantages=cancelling)
    assert biases(cancelling).abs().max() < 1e-6 * cancelling.abs().max()
    exact = run(world, "top_k", "reference", policy=policy, **wide)
    near = PolicyTerm(advantages=cancelling.float())
    for way in WAYS:
        found = run(world, "top_k", way, torch.float32, policy=near, **settings)
        for name in GRADIENTS:
            assert (found[name] - exact[name]).norm() < 1e-5 * exact[name].norm(), name

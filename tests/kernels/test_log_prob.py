"""linear_log_prob: log-probs and entropies that any policy loss may differentiate, recomputed rather than kept."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import Products, World

from opd.errors import NonFiniteError, ObjectiveError
from opd.kernels import linear_log_prob
from opd.losses import policy_gradient_loss
from opd.testing import assert_close_to_reference

WORLD = World(23, 7, 37)


def leaves(world: World = WORLD, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [part.to(dtype).clone().requires_grad_() for part in (world.hidden_states, world.weight, world.bias)]


def plain(hidden, weight, bias, ids, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = torch.nn.functional.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    logp = torch.log_softmax(logits / temperature, -1)
    picked = logp.gather(-1, ids[:, None]).squeeze(-1)
    return picked, -(logp.exp() * logp.clamp_min(-1e30)).sum(-1)


def loss_of(logp: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """Anything that is not linear in either."""
    return (logp.square() * torch.linspace(-1, 2, len(logp), dtype=logp.dtype)).sum() + (0.3 * entropy.exp()).sum()


def test_a_fair_coin_of_two_tokens_by_hand():
    weight = torch.tensor([[0.2], [0.8]], dtype=torch.float64).log().requires_grad_()
    hidden = torch.ones(1, 1, dtype=torch.float64)
    logp, entropy = linear_log_prob(hidden, weight, torch.tensor([1]))
    wanted = -0.2 * math.log(0.2) - 0.8 * math.log(0.8)
    assert logp.item() == pytest.approx(math.log(0.8), abs=1e-15)
    assert entropy.item() == pytest.approx(wanted, abs=1e-15)
    (logp + 10 * entropy).sum().backward()
    rise = -10 * 0.2 * (math.log(0.2) + wanted) - 0.2  # d H/dz = −p (log p + H), d log p(1)/dz₀ = −p₀
    assert weight.grad.flatten().tolist() == pytest.approx([rise, -rise], abs=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("chunk", [1, 5, 23, 100, None])
def test_values_and_gradients_are_those_of_log_softmax(chunk, temperature):
    for with_bias in (True, False):
        own, other = leaves(), leaves()
        if not with_bias:
            own[2] = other[2] = None
        found = linear_log_prob(
            own[0], own[1], WORLD.response_ids, bias=own[2], temperature=temperature, chunk_tokens=chunk
        )
        wanted = plain(*other, WORLD.response_ids, temperature)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
        loss_of(*found).backward()
        loss_of(*wanted).backward()
        for a, b in zip(own, other, strict=True):
            if a is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-11)


def test_gradcheck_of_both_outputs():
    world = World(4, 3, 6, seed=2)
    for temperature in (1.0, 1.7):
        assert torch.autograd.gradcheck(
            lambda h, w, b, t=temperature: linear_log_prob(
                h, w, world.response_ids, bias=b, temperature=t, chunk_tokens=3
            ),
            leaves(world),
        )


@pytest.mark.parametrize("part", [0, 1])
def test_one_output_alone_can_be_differentiated(part):
    own, other = leaves(), leaves()
    linear_log_prob(own[0], own[1], WORLD.response_ids, bias=own[2], chunk_tokens=5)[part].sum().backward()
    plain(*other, WORLD.response_ids)[part].sum().backward()
    for a, b in zip(own, other, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)


def test_backward_can_be_run_again():
    own = leaves()
    logp, _ = linear_log_prob(*own[:2], WORLD.response_ids, bias=own[2])
    first = torch.autograd.grad(logp.sum(), own, retain_graph=True)
    again = torch.autograd.grad(2 * logp.sum(), own)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(2 * a, b, rtol=0, atol=1e-13)


def test_a_policy_loss_of_losses_can_be_written_on_top():
    own, other = leaves(), leaves()
    for inputs, logp in (
        (own, linear_log_prob(own[0], own[1], WORLD.response_ids, bias=own[2], chunk_tokens=5)[0]),
        (other, plain(*other, WORLD.response_ids)[0]),
    ):
        policy_gradient_loss(logp, WORLD.advantages, WORLD.old, (0.2, 0.3)).mean().backward()
        assert inputs[0].grad is not None
    for a, b in zip(own, other, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 60.0, -150.0])
def test_it_is_as_accurate_as_log_softmax(dtype, offset):
    for shape in ((1, 1, 2), (7, 5, 129), (33, 64, 1003)):
        world = World(*shape, dtype, offset=offset)
        exact, rounded, own = leaves(world), leaves(world, dtype), leaves(world, dtype)
        runs = {}
        for name, inputs in (("exact", exact), ("plain", rounded)):
            runs[name] = plain(*inputs, world.response_ids)
        runs["fast"] = linear_log_prob(own[0], own[1], world.response_ids, bias=own[2], chunk_tokens=4)
        for found in runs.values():
            (found[0] + 0.3 * found[1]).sum().backward()
        floor = 2.0**-22 * max(1.0, float(world.logits().abs().max()))  # one rounding of each of two logits
        for a, b, c in zip(runs["fast"], runs["plain"], runs["exact"], strict=True):
            assert_close_to_reference(a, b, c, floor=floor)
        half_ulp = torch.finfo(dtype).eps / 2
        for a, b, c in zip(own, rounded, exact, strict=True):
            size = c.grad.abs().max()
            rounding = half_ulp if dtype == torch.bfloat16 else 0.0
            reach = floor * max(float(part.abs().max()) for part in (world.weight, world.hidden_states)) * shape[0]
            assert_close_to_reference(a.grad / size, b.grad / size, c.grad / size, floor=rounding + reach / float(size))
        assert own[0].grad.dtype == own[1].grad.dtype == dtype


@pytest.mark.parametrize(("wants", "forward", "backward"), [("hwb", 1, 3), ("hb", 1, 2), ("wb", 1, 2), ("", 1, 0)])
def test_one_product_forward_and_three_backward(wants, forward, backward):
    own = [leaf.requires_grad_(name in wants) for leaf, name in zip(leaves(), "hwb", strict=True)]
    with Products() as seen:
        logp, entropy = linear_log_prob(own[0], own[1], WORLD.response_ids, bias=own[2], chunk_tokens=12)
    assert seen.count == forward * 2
    if wants:
        with Products() as seen:
            (logp + entropy).sum().backward()
        assert seen.count == backward * 2
    with Products() as seen, torch.no_grad():
        linear_log_prob(own[0], own[1], WORLD.response_ids)
    assert seen.count == 1


def test_tokens_without_an_incoming_gradient_cost_nothing_backward():
    own, other = leaves(), leaves()
    logp, _ = linear_log_prob(own[0], own[1], WORLD.response_ids, bias=own[2])
    with Products() as seen:
        logp[:6].sum().backward()
    assert {6} == {size for left, _ in seen.shapes for size in left if size not in (7, 37)}
    plain(*other, WORLD.response_ids)[0][:6].sum().backward()
    for a, b in zip(own, other, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)
    assert not own[0].grad[6:].any()


def test_no_incoming_gradient_at_all_gives_zero_gradients():
    own = leaves()
    logp, entropy = linear_log_prob(own[0], own[1], WORLD.response_ids, bias=own[2])
    (0.0 * logp + 0.0 * entropy).sum().backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in own)


def test_an_empty_batch():
    own = leaves(World(0, 7, 37))
    logp, entropy = linear_log_prob(own[0], own[1], torch.zeros(0, dtype=torch.long), bias=own[2])
    assert logp.shape == entropy.shape == (0,)
    (logp.sum() + entropy.sum()).backward()
    assert not own[1].grad.any() and own[0].grad.shape == (0, 7)


def test_padding_beyond_the_valid_vocabulary_has_no_probability():
    own, other = leaves(), leaves()
    ids = WORLD.response_ids % 29
    found = linear_log_prob(own[0], own[1], ids, bias=own[2], valid_vocab=29)
    wanted = plain(other[0], other[1][:29], other[2][:29], ids)
    loss_of(*found).backward()
    loss_of(*wanted).backward()
    for a, b in zip((*found, *(leaf.grad for leaf in own)), (*wanted, *(leaf.grad for leaf in other)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_a_token_that_cannot_occur_has_log_prob_minus_infinity_and_the_entropy_ignores_it():
    for dtype in (torch.float64, torch.float32):
        own, other = leaves(dtype=dtype), leaves(dtype=dtype)
        for inputs in (own, other):
            with torch.no_grad():
                inputs[2][[3, 5]] = -torch.inf
        ids = WORLD.response_ids.clone()
        ids[0], ids[1:] = 3, torch.where(torch.isin(ids[1:], torch.tensor([3, 5])), 4, ids[1:])
        found = linear_log_prob(own[0], own[1], ids, bias=own[2])
        wanted = plain(*other, ids)
        assert found[0][0] == -math.inf
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a[1:], b[1:], rtol=1e-5, atol=1e-6)
        (found[0][1:].sum() + found[1].sum()).backward()
        (wanted[0][1:].sum() + wanted[1].sum()).backward()
        for a, b in zip(own[:2], other[:2], strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_autocast_around_forward_or_backward_changes_nothing():
    world = World(23, 7, 37, torch.float32)
    grads = []
    for context in (False, True):
        own = leaves(world, torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=context):
            logp, entropy = linear_log_prob(own[0], own[1], world.response_ids, bias=own[2])
            assert logp.dtype == entropy.dtype == torch.float32
            (logp + entropy).sum().backward()
        grads.append([leaf.grad for leaf in own])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_weights_changed_between_forward_and_backward_are_noticed():
    own = leaves()
    logp, _ = linear_log_prob(own[0], own[1], WORLD.response_ids)
    with torch.no_grad():
        own[1].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"token_ids": torch.zeros(5, dtype=torch.long)}, ObjectiveError, r"shape \(5,\).*23 tokens; one number per token"),
        ({"token_ids": torch.zeros(23)}, ObjectiveError, "must be whole numbers"),
        ({"token_ids": torch.full((23,), 37)}, ObjectiveError, "37 at token 0.*37 entries"),
        ({"token_ids": torch.full((23,), -100)}, ObjectiveError, "-100 at token 0.*masked tokens need a valid id"),
        ({"temperature": 0.0}, ObjectiveError, "student_temperature=0.0 must be > 0"),
        ({"chunk_tokens": 0}, ObjectiveError, "chunk_tokens=0 must be a whole number ≥ 1"),
        ({"valid_vocab": 38}, ObjectiveError, "valid_vocab=38.*37 rows"),
        ({"weight": WORLD.weight.float()}, ObjectiveError, "cast one to the other's"),
        ({"weight": WORLD.weight.T}, ObjectiveError, "37 features.*transposed|7 features.*transposed"),
        ({"hidden": WORLD.hidden_states.index_fill(0, torch.tensor(4), math.nan)}, NonFiniteError, "nan in row 4"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_any_product(changes, error, message):
    given = {"hidden": WORLD.hidden_states, "weight": WORLD.weight, "token_ids": WORLD.response_ids} | changes
    hidden, weight, ids = given.pop("hidden"), given.pop("weight"), given.pop("token_ids")
    with Products() as seen, pytest.raises(error, match=message):
        linear_log_prob(hidden, weight, ids, **given)
    assert seen.count == 0

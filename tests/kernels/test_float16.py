"""float16 has 5 bits of exponent: what a gradient of a million tokens is made of must not be rounded in it before a loss scale arrives."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from kernel_cases import GRADIENTS, WAYS, World, run

from opd.integrations.verl.plugin.logits import token_losses
from opd.kernels import linear_log_prob, linear_objective
from opd.losses import Objective
from opd.types import DenseTarget

HALF = torch.float16
SCALE = 65536.0  # torch.amp.GradScaler begins with it
TOKENS = (64, 65536, 1 << 20)


def world_of(tokens: int, closeness: float | None = 0.05, vocab: int = 501) -> World:
    """Sixteen tokens of a step of so many."""
    made = World(16, 32, vocab, HALF, closeness=closeness)
    made.parts["token_weights"] = torch.full((16,), 1.0 / tokens, dtype=torch.float64)
    return made


def errors(found: dict, exact: dict, scale: float = 1.0) -> dict[str, float]:
    return {n: float((found[n].double() / scale - exact[n]).norm() / exact[n].norm()) for n in GRADIENTS}


@pytest.mark.parametrize("kind", ["hidden", "top_k", "sampled"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_under_a_loss_scale_a_gradient_is_rounded_once_whatever_the_number_of_tokens(tokens, way, kind):
    """A rounding of float16 is 2⁻¹¹ of an entry, 3e-4 root mean square."""
    world = world_of(tokens)
    exact = run(world, kind, "reference", torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run(world, kind, way, HALF, scale=SCALE)
    assert found["d_hidden"].dtype == HALF
    for name, error in errors(found, exact, SCALE).items():
        assert error < 6e-4, f"{name}: {error:.1e}"


def test_pytorchs_scaler_gets_the_gradient_of_a_million_tokens():
    world = world_of(1 << 20, closeness=None)
    exact = run(world, "hidden", "reference", torch.float64)
    hidden, weight = (part.to(HALF).requires_grad_() for part in (world.hidden_states, world.weight))
    scaler = torch.amp.GradScaler("cpu")
    loss, _, _ = linear_objective(
        hidden, weight, world.target("hidden", HALF), world.response_ids, Objective(), bias=world.bias.to(HALF),
        token_weights=world.token_weights.float(),
    )  # fmt: skip
    scaler.scale(loss).backward()
    for leaf, name in ((hidden, "d_hidden"), (weight, "d_weight")):
        assert leaf.grad is not None
        assert float((leaf.grad.double() / scaler.get_scale() - exact[name]).norm() / exact[name].norm()) < 6e-4


def test_without_a_loss_scale_the_loss_of_digits_is_said_and_the_advice_helps():
    world = world_of(65536)
    with pytest.warns(UserWarning, match=r"float16 rounds away [\d.]+% of a gradient.*torch\.amp\.GradScaler"):
        found = run(world, "hidden", "chunked", HALF)
    exact = run(world, "hidden", "reference", torch.float64)
    assert max(errors(found, exact).values()) > 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(world, "hidden", "chunked", HALF, scale=SCALE)
        run(world_of(64, closeness=None), "hidden", "chunked", HALF)
        run(world, "hidden", "chunked", torch.bfloat16)


@pytest.mark.parametrize("tokens", TOKENS)
def test_log_probs_are_differentiated_under_a_loss_scale(tokens):
    world = world_of(tokens)

    def slopes(dtype: torch.dtype, scale: float):
        leaves = [part.detach().to(dtype, copy=True).requires_grad_() for part in (world.hidden_states, world.weight)]
        logp, entropy = linear_log_prob(*leaves, world.response_ids)
        (scale / tokens * (logp - 0.1 * entropy).sum()).backward()
        return [leaf.grad.double() / scale for leaf in leaves]

    for found, exact in zip(slopes(HALF, SCALE), slopes(torch.float64, 1.0), strict=True):
        assert (found - exact).norm() < 6e-4 * exact.norm()


# --- products of 16-bit operands with a result of 32 bits, as CUDA has them -------------------------------------------


@pytest.mark.parametrize("closeness", [None, 0.02])
@pytest.mark.parametrize("tokens", TOKENS)
def test_half_operands_of_gradient_products_keep_their_digits(mixed, tokens, closeness):
    """d(logits) holds p (f − Σ p f), most of which is below float16's smallest number, and the hidden rows hold 1/N."""
    world = world_of(tokens, closeness, vocab=4001)
    exact = run(world, "hidden", "reference", torch.float64)
    for way in ("chunked", "minimal"):
        mixed.clear()
        found = run(world, "hidden", way, HALF, scale=SCALE)
        assert set(mixed) == {HALF} and len(mixed) >= 4
        for name, error in errors(found, exact, SCALE).items():
            assert error < 1.5e-3, f"{way}, {name}: {error:.1e}"


def test_log_probs_of_half_operands_keep_their_digits(mixed):
    world = world_of(1 << 20, None, vocab=4001)
    found = []
    for dtype, scale in ((torch.float64, 1.0), (HALF, SCALE)):
        leaves = [part.detach().to(dtype, copy=True).requires_grad_() for part in (world.hidden_states, world.weight)]
        (scale / (1 << 20) * linear_log_prob(*leaves, world.response_ids)[0].sum()).backward()
        found.append([leaf.grad.double() / scale for leaf in leaves])
    assert set(mixed) == {HALF}
    for exact, got in zip(*found, strict=True):
        assert (got - exact).norm() < 1.5e-3 * exact.norm()


# --- whole logits, as verl's patch has them ---------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, SCALE])
@pytest.mark.parametrize("tokens", TOKENS)
def test_whole_logits_of_half_get_the_gradient_of_every_token(tokens, scale):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 4001, generator=generator).to(HALF)
    teacher = (logits.float() + 0.02 * torch.randn(12, 4001, generator=generator)).to(HALF)
    slopes = []
    for dtype in (torch.float64, HALF):
        z = logits.to(dtype).requires_grad_()
        loss = token_losses(
            z, [teacher.to(dtype)], Objective(divergence="generalized_jsd"), positions=torch.arange(1, 11)
        ).loss
        (scale / tokens * loss.sum()).backward()
        assert z.grad is not None
        slopes.append(z.grad.double())
    assert not slopes[1][0].any() and not slopes[1][11].any()
    largest = float(slopes[0].abs().max())
    rounding = (
        2.0**-25
    )  # half of float16's smallest number: what no scale inside can help, because the answer is float16
    assert (slopes[1] - slopes[0]).abs().max() < 2.0**-10 * largest + rounding
    if slopes[0][1:11].square().mean().sqrt() > 1e-3:
        assert scale > 1 and (slopes[1] - slopes[0]).norm() < 1e-3 * slopes[0].norm()
    elif scale > 1:
        assert tokens > 64


def test_whole_logits_take_torch_func_and_rows_that_nobody_weighs():
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 6, 17, generator=generator, dtype=torch.float64)
    weights = torch.tensor([0.3, 0.0, 0.2, 0.5], dtype=torch.float64)

    def loss(z: torch.Tensor) -> torch.Tensor:
        losses = token_losses(z, [teacher], Objective(), positions=torch.tensor([1, 2, 3, 5])).loss
        return torch.where(weights == 0, 0.0, losses * weights).sum()

    z = logits.clone().requires_grad_()
    loss(z).backward()
    assert z.grad is not None
    torch.testing.assert_close(torch.func.grad(loss)(logits), z.grad)
    broken = logits.index_fill(0, torch.tensor([2]), math.nan).requires_grad_()
    loss(broken).backward()
    torch.testing.assert_close(broken.grad, z.grad)
    dense = torch.func.grad(
        lambda x: Objective().per_token_loss(x, DenseTarget(logits=teacher), torch.zeros(6, dtype=torch.long))[0][5]
    )
    torch.testing.assert_close(dense(logits)[5] * 0.5, z.grad[5])

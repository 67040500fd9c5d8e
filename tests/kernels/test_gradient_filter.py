"""gradient_filter=ε leaves out columns whose gradient is small everywhere in a chunk, and errs by no more than it says."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import GRADIENTS, Products, World, assert_same, run

from opd.kernels import linear_divergence, walk

CHUNK = 8
WORLD = World(24, 7, 211, scale=3.0)
WEIGHTS = torch.linspace(0.2, 3.0, 24, dtype=torch.float64)


def slopes(temperature: float = 1.0, **settings) -> torch.Tensor:
    """|∂ loss / ∂ z| of every token and column, loss unweighted and z before the temperature."""
    weight = torch.eye(WORLD.vocab, dtype=torch.float64)
    logits = WORLD.logits().requires_grad_()
    out = linear_divergence(
        logits,
        weight,
        WORLD.target("hidden"),
        response_ids=WORLD.response_ids,
        impl="reference",
        student_temperature=temperature,
        **settings,
    )
    out.loss.backward()
    assert logits.grad is not None
    return logits.grad


def kept(g: torch.Tensor, epsilon: float) -> torch.Tensor:
    """[tokens, vocab]: which columns of each chunk stay."""
    above = [(part.abs().amax(0) > epsilon).expand(len(part), -1) for part in g.split(CHUNK)]
    return torch.cat(above)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "generalized_jsd", "total_variation"])
def test_a_filter_of_0_changes_nothing(divergence):
    plain = run(WORLD, "hidden", "chunked", chunk_tokens=CHUNK, divergence=divergence)
    filtered = run(WORLD, "hidden", "chunked", chunk_tokens=CHUNK, divergence=divergence, gradient_filter=0.0)
    assert all(torch.equal(filtered[name], value) for name, value in plain.items())


@pytest.mark.parametrize("epsilon", [1e-3, 1e-2, 0.1, 0.5])
def test_the_error_stays_within_both_bounds(monkeypatch, epsilon):
    monkeypatch.setattr(walk, "FILTER_PAYS", 1.0)
    settings = {"token_weights": WEIGHTS, "chunk_tokens": CHUNK, "policy": True}
    exact = run(WORLD, "hidden", "chunked", **settings)
    found = run(WORLD, "hidden", "chunked", **settings, gradient_filter=epsilon)
    dropped = ~kept(slopes(policy=WORLD.policy()), epsilon)
    of_hidden = (found["d_hidden"] - exact["d_hidden"]).abs()
    assert (of_hidden <= epsilon * WEIGHTS[:, None] * (dropped.double() @ WORLD.weight.abs()) + 1e-14).all()
    of_weight = (found["d_weight"] - exact["d_weight"]).abs()
    assert (of_weight <= epsilon * (WEIGHTS[:, None] * WORLD.hidden_states.abs()).sum(0) + 1e-14).all()
    assert of_hidden.any() and of_weight.any()  # something was dropped
    for name in exact.keys() - {"d_hidden", "d_weight"}:
        torch.testing.assert_close(found[name], exact[name], rtol=0, atol=1e-13)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_exactly_the_small_columns_of_each_chunk_are_left_out(monkeypatch, temperature):
    monkeypatch.setattr(walk, "FILTER_PAYS", 1.0)
    for epsilon in (1e-4, 3e-3, 0.05):
        settings = {"token_weights": WEIGHTS, "chunk_tokens": CHUNK, "student_temperature": temperature}
        found = run(WORLD, "hidden", "chunked", **settings, gradient_filter=epsilon)
        g = slopes(temperature)
        g = torch.where(kept(g, epsilon), g, 0.0) * WEIGHTS[:, None]
        torch.testing.assert_close(found["d_hidden"], g @ WORLD.weight, rtol=0, atol=1e-13)
        torch.testing.assert_close(found["d_weight"], g.T @ WORLD.hidden_states, rtol=0, atol=1e-13)


def test_a_filter_above_every_gradient_leaves_only_the_bias():
    found = run(WORLD, "hidden", "chunked", chunk_tokens=CHUNK, gradient_filter=100.0)
    exact = run(WORLD, "hidden", "chunked", chunk_tokens=CHUNK)
    assert not found["d_hidden"].any() and not found["d_weight"].any()
    torch.testing.assert_close(found["d_bias"], exact["d_bias"], rtol=0, atol=0)


def test_fewer_columns_enter_the_gradient_products():
    target = WORLD.target("hidden")
    g = slopes()
    with Products() as seen:
        run(WORLD, lambda _: target, "chunked", chunk_tokens=CHUNK, gradient_filter=0.05)
    wanted = [int(part[0].sum()) for part in kept(g, 0.05).split(CHUNK)]
    assert all(0 < count < 0.6 * WORLD.vocab for count in wanted)
    inner = [(left[1] if left[0] == CHUNK else left[0]) for left, right in seen.shapes if right[1] == 7]
    assert inner == [count for count in wanted for _ in range(2)]


def test_a_filter_that_keeps_most_columns_gathers_nothing():
    """Above 0.6 of the columns gathering costs more than the products it saves: then all of them stay."""
    epsilon = float(slopes().abs().median()) / 50
    plain = run(WORLD, "hidden", "chunked", chunk_tokens=CHUNK)
    found = run(WORLD, "hidden", "chunked", chunk_tokens=CHUNK, gradient_filter=epsilon)
    assert all(torch.equal(found[name], plain[name]) for name in GRADIENTS)


def test_a_filter_works_on_every_target_and_in_every_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        world = World(24, 7, 211, dtype, scale=3.0)
        for kind in ("dense", "loss", "top_k", "sampled", "probability"):
            exact = run(world, kind, "chunked", dtype, chunk_tokens=CHUNK)
            found = run(world, kind, "chunked", dtype, chunk_tokens=CHUNK, gradient_filter=1e-6)
            assert_same(found, exact, 1e-3 if dtype == torch.float32 else 2e-2)


def test_frozen_parts_are_skipped_under_a_filter_too():
    everything = run(WORLD, "hidden", "chunked", chunk_tokens=CHUNK, gradient_filter=0.01)
    for grads in ("h", "w", "b"):
        found = run(WORLD, "hidden", "chunked", chunk_tokens=CHUNK, gradient_filter=0.01, grads=grads)
        name = {"h": "d_hidden", "w": "d_weight", "b": "d_bias"}[grads]
        assert found.keys() & set(GRADIENTS) == {name}
        assert torch.equal(found[name], everything[name])

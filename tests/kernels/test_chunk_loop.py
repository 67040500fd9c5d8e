"""Chunks are no setting of the loss; and what nobody needs is not computed."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import CLOSED, ENDS, GRADIENTS, OUTPUTS, WHOLE, Products, World, assert_same, run

from opd.kernels import chunk_loop, linear_divergence
from opd.kernels.spec import select_target

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
    monkeypatch.setattr("opd.kernels.spec.CPU_PIECE", 2 * WORLD.vocab)
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
def test_chunks_are_as_few_as_can_be_and_no_larger_than_asked_for(monkeypatch, tokens, chunk, rows):
    """Where they can be, they are alike in size, in steps of here 16 rows."""
    monkeypatch.setattr(chunk_loop, "ROW_MULTIPLE", 16)
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
    for kind, divergence in (("hidden", "reverse_kl"), ("hidden", "total_variation"), ("loss", "forward_kl"), ("top_k", "reverse_kl"), ("sampled", "reverse_kl")):  # fmt: skip
        policy = world.policy(torch.float64)
        for dtype in (torch.float64, torch.bfloat16):
            weights = (torch.arange(23) % 4 / 4).to(dtype)
            settings = {"token_weights": weights, "policy": policy, "sampler_logp": world.old, "divergence": divergence}
            wanted = run(world, kind, "reference", torch.float32, **settings)
            got = run(world, kind, "chunked", torch.float32, chunk_tokens=5, **settings)
            assert {value.dtype for value in (*got.values(), *wanted.values())} == {torch.float32}
            assert_same(got, wanted, 1e-5)


def test_a_top_k_in_double_precision_feeds_a_student_in_single():
    world = World(23, 7, 37, torch.float32)
    for never in (None, 3):
        if never is not None:
            world.parts["bias"][never] = -torch.inf  # rows that are done again
        for tail in ("bucket", "sampled"):
            for divergence in ("reverse_kl", "generalized_jsd"):
                settings = {"tail": tail, "divergence": divergence, "policy": world.policy(old_log_prob=None)}
                wanted = run(world, lambda _: world.target("top_k"), "reference", torch.float32, **settings)
                got = run(world, lambda _: world.target("top_k"), "chunked", torch.float32, chunk_tokens=5, **settings)
                for name in ("student_logp", "policy_loss"):
                    got[name], wanted[name] = got[name].nan_to_num(), wanted[name].nan_to_num()
                assert {value.dtype for value in (*got.values(), *wanted.values())} == {torch.float32}
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


# --- rows that are done again -----------------------------------------------------------------------------------------


@pytest.fixture
def again(monkeypatch) -> list[list[int]]:
    """The rows of each time that some did not fit the fast pass."""
    seen: list[list[int]] = []
    plain = chunk_loop.recompute_nonfinite_rows

    def counting(student, teacher, rows, index, z, out):
        bad = out.nonfinite_rows()
        if len(bad):
            seen.append((bad + index.start).tolist())
        plain(student, teacher, rows, index, z, out)

    monkeypatch.setattr(chunk_loop, "recompute_nonfinite_rows", counting)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_ordinary_rows_are_done_once(again, kind):
    for offset in (0.0, 35.0, -15.0):
        world = World(23, 7, 37, torch.float32, offset=offset)
        for divergence in CLOSED + ENDS if kind in WHOLE else ({},):
            run(world, kind, "chunked", torch.float32, chunk_tokens=8, **divergence, **SETTINGS[kind])
    assert not again


def test_rows_out_of_range_are_done_again_and_the_chunks_after_them_are_shifted(again):
    far = torch.zeros(24, dtype=torch.float64)
    far[[2, 5, 12, 20]] = torch.tensor([80.0, -120.0, 300.0, 90.0], dtype=torch.float64)
    for divergence in CLOSED + ENDS:
        world = World(24, 7, 37, torch.float32, scale=1.0)
        world.parts["hidden"][:, 0] = far
        world.parts["weight"][:, 0] = 1.0
        run(world, "hidden", "chunked", torch.float32, chunk_tokens=8, **divergence)
        assert again == [[2, 5]]
        again.clear()


def test_shifted_rows_with_vanishing_probabilities_are_done_once(again):
    """Logits 200 nats apart: most of e^z is 0 in float32, for both models at once."""
    for divergence in CLOSED + ENDS:
        world = World(24, 7, 129, torch.float32, scale=60.0)
        run(world, "hidden", "chunked", torch.float32, chunk_tokens=8, **divergence)
        assert all(max(rows) < 8 for rows in again)
        again.clear()

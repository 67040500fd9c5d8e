"""d(logits) that is kept, as the products take it, until one product can take all of it: a GPU's way, with its parts run here."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import CLOSED, DIVERGENCES, PARTIAL, TAILS, WHOLE, Products, World, assert_same, named, run

from opd.kernels import api, chunk_loop, linear_log_prob, linear_objective, log_prob
from opd.kernels.spec import head_spec, stored_tokens
from opd.losses import Objective
from opd.types import DenseTarget

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux)")
with pytest.MonkeyPatch.context() as _patch:
    _patch.setenv("TRITON_INTERPRET", "1")
    from opd.kernels.rows import triton as row_kernels
    from opd.kernels.rows.triton import kernels

KINDS = (*WHOLE, "top_k", "sampled", "none")
GRADS = ("hwb", "hw", "w", "h")
CUDA = torch.cuda.is_available()
pytestmark = [
    pytest.mark.skipif(CUDA, reason="there it is what happens anyway (make gpu, part truth)"),
    pytest.mark.filterwarnings("ignore:generalized_jsd with normalize=False"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch):
    def keep(tokens: int) -> None:
        monkeypatch.setattr(chunk_loop, "stored_tokens", lambda head: tokens)

    return keep


def settings_of(kind: str, number: int = 0) -> dict:
    more = {"policy": True, "entropy_bonus": 0.1}
    if kind == "none":
        return more
    if kind == "top_k":
        return more | PARTIAL[number % len(PARTIAL)] | {"tail": TAILS[number % len(TAILS)]}
    return more if kind == "sampled" else DIVERGENCES[number % len(DIVERGENCES)]


@pytest.mark.parametrize("grads", GRADS)
@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_are_those_of_multiplying_every_chunk(kind, impl, grads, store):
    """Kept whole, in two parts, and in parts that do not fit the chunks; with a bias, whose sum needs what was not rounded, and without.
    With either implementation, each kind meets every size of the store, with one of the sets of gradients or another."""
    world = World(23, 7, 37)
    sizes = (64, 23, 12, 8, 5)
    first = GRADS.index(grads) + KINDS.index(kind) + 2 * ("chunked", "triton").index(impl)
    for number in (first % len(sizes), (first + 1) % len(sizes)):
        tokens = sizes[number]
        settings = settings_of(kind, number) | {"chunk_tokens": 4, "grads": grads}
        store(0)
        wanted = run(world, kind, impl, **settings)
        store(tokens)
        assert_same(run(world, kind, impl, **settings), wanted, 1e-12)


@pytest.mark.parametrize(("tokens", "times"), [(0, 6), (4, 6), (8, 3), (12, 2), (24, 1), (100, 1)])
def test_the_gradient_products_are_as_few_as_the_store_allows(tokens, times, store):
    store(tokens)
    world = World(24, 7, 37)
    target = world.target("hidden")
    with Products() as seen:
        run(world, lambda _: target, "chunked", chunk_tokens=4)
    assert seen.count == 2 * 6 + 2 * times


@pytest.mark.parametrize("divergence", CLOSED, ids=named)
def test_rows_that_are_done_again_are_put_where_the_kernels_wrote(divergence, store):
    """Teacher logits of −inf: infinite under a reverse KL, and finite, by autograd, under the others."""
    world = World(9, 7, 37)

    def cut(dtype: torch.dtype) -> DenseTarget:
        logits = world.teacher_logits()
        logits[[0, 3, 8], 2:5] = -torch.inf
        return DenseTarget(logits=logits.to(dtype))

    wanted = run(world, cut, "reference", grads="hw", **divergence)
    store(6)
    assert_same(run(world, cut, "triton", grads="hw", chunk_tokens=3, **divergence), wanted, 1e-11)


def test_tokens_of_weight_0_and_empty_batches_leave_no_trace(store):
    world = World(23, 7, 37)
    weights = world.token_weights * (torch.arange(23) % 3 != 1)
    wanted = run(world, "hidden", "reference", token_weights=weights)
    store(8)
    assert_same(run(world, "hidden", "triton", chunk_tokens=4, token_weights=weights), wanted, 1e-11)
    found = run(world, "hidden", "triton", token_weights=torch.zeros_like(weights))
    assert not found["d_weight"].any() and not found["d_hidden"].any()


@pytest.mark.parametrize("kind", ["hidden", "top_k", "sampled", "none"])
def test_the_kernels_write_into_the_store_themselves_wherever_that_rounds_once(kind, store, monkeypatch):
    """A policy term beside a teacher's logits is added to what a kernel wrote, so that it goes through float32 rows."""
    seen = []
    plain = chunk_loop.HeadLogits.add_gradient

    def watched(self, gradient, scale, rows):
        seen.append(gradient.data_ptr() == self._room(rows).data_ptr())
        plain(self, gradient, scale, rows)

    monkeypatch.setattr(chunk_loop.HeadLogits, "add_gradient", watched)
    store(32)
    world = World(23, 7, 37)
    for grads, policy in (("hw", False), ("hw", True), ("hwb", False)):
        if kind == "none" and not policy:
            continue
        run(world, kind, "triton", chunk_tokens=8, grads=grads, **({"policy": True} if policy else {}))
        assert seen == [grads == "hw" and not (policy and kind == "hidden")] * 3
        seen.clear()


@pytest.mark.parametrize("extras", [{}, {"policy": True, "entropy_bonus": 0.3}], ids=named)
@pytest.mark.parametrize("kind", ["hidden", "top_k", "none"])
def test_what_the_kernels_write_in_16_bits_is_the_gradient_rounded_once(kind, extras, store, monkeypatch):
    """Also at a token whose probability is nearly 1, where a policy's slope and its multiple of p all but cancel.

    The interpreter rounds to float16 as a GPU does; to bfloat16 it truncates.
    """
    if kind == "none" and not extras:
        return
    rooms = []
    plain = chunk_loop.HeadLogits.gradient_room

    def in_16_bits(self, index, settle):
        room = plain(self, index, settle)
        rooms.append(None if room is None else torch.zeros(room.shape, dtype=torch.float16))
        return rooms[-1]

    exact = []
    world = World(16, 8, 131, torch.float32, scale=5.0)
    world.parts["response_ids"] = world.logits().argmax(-1)
    if extras:
        extras = extras | {"policy": world.policy(torch.float32, old_log_prob=None)}
    store(16)
    keep = chunk_loop.HeadLogits.add_gradient
    monkeypatch.setattr(chunk_loop.HeadLogits, "add_gradient", lambda self, g, s, r: (exact.append(g.clone()), keep(self, g, s, r)))  # fmt: skip
    run(world, kind, "triton", torch.float32, grads="hw", **extras)
    monkeypatch.setattr(chunk_loop.HeadLogits, "gradient_room", in_16_bits)
    found, exact[:] = exact[0], []
    run(world, kind, "triton", torch.float32, grads="hw", **extras)
    written = exact[0]
    if kind == "hidden" and extras:
        assert written.dtype == torch.float32
        return
    assert written.dtype == torch.float16
    difference = (written.double() - found.double()).abs()
    assert bool((difference <= 2.0**-11 * found.double().abs() + 1e-7).all())


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.7, 1.6)])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=named)
def test_the_kernels_diagnostics_are_the_definition_s(divergence, temperatures, store):
    """At temperature 1 whatever the loss's is; with masked ids, padding and several ids that end an answer."""
    world, found = World(23, 8, 137), {}
    objective = Objective(**divergence, student_temperature=temperatures[0], teacher_temperature=temperatures[1])
    for impl in ("reference", "triton"):
        total, per_token, metrics = linear_objective(
            world.hidden_states.clone().requires_grad_(), world.weight, world.target("hidden"), world.response_ids % 120, objective,
            token_weights=world.token_weights, bias=world.bias, valid_vocab=130, masked_ids=(121, 3, 125), eos_ids=(5, 9),
            chunk_tokens=8, impl=impl,
        )  # fmt: skip
        found[impl] = {"total": total.detach(), "per_token": per_token, **metrics}
    assert found["triton"].keys() == found["reference"].keys()
    assert_same(found["triton"], found["reference"], 1e-11)


def test_an_infinite_kl_is_told_as_infinite_whatever_the_loss():
    """A teacher that rules tokens out: the reverse KL that a forward KL's run shows is +inf there and nowhere else."""
    world = World(6, 8, 137)
    logits = world.teacher_logits()
    logits[[1, 4], 7] = -torch.inf
    logits[4] += torch.linspace(0, 300, 137, dtype=torch.float64)  # the largest come long after the −inf
    target, found = DenseTarget(logits=logits), {}
    for impl in ("reference", "triton"):
        _, _, metrics = linear_objective(
            world.hidden_states, world.weight, target, torch.full_like(world.response_ids, 9), Objective(divergence="forward_kl"),
            token_weights=world.token_weights, impl=impl,
        )  # fmt: skip
        found[impl] = metrics
    assert found["triton"]["reverse_kl"].isinf().tolist() == [False, True, False, False, True, False]
    assert_same(found["triton"], found["reference"], 1e-11)


def test_the_overlap_of_the_likeliest_counts_what_both_have(monkeypatch):
    """Rows of many lanes' length: the 16 likeliest of 600 tokens, found from the largest of 32 lanes."""
    monkeypatch.setattr(row_kernels.rows, "LANES", 32)
    world = World(11, 8, 600, closeness=0.4)
    world.parts["bias"][-1] += (
        9.0  # the likeliest is in the last column: it must be found once, and no column beyond it
    )
    found = {}
    for impl in ("reference", "triton"):
        _, _, metrics = linear_objective(
            world.hidden_states, world.weight, world.target("hidden"), world.response_ids, Objective(), bias=world.bias,
            token_weights=world.token_weights, impl=impl,
        )  # fmt: skip
        found[impl] = metrics["overlap"]
    assert torch.equal(found["triton"], found["reference"])
    assert 0.1 < float(found["triton"].mean()) < 1.0


@pytest.mark.parametrize("stored", [0, 8, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_log_probs_by_the_kernels_are_those_of_the_plain_passes(dtype, stored, store, monkeypatch):
    world = World(23, 7, 37, torch.float32)
    world.parts["bias"][5] = -torch.inf
    store(stored)

    def found() -> list[torch.Tensor]:
        leaves = [part.to(dtype).clone().requires_grad_() for part in (world.hidden_states, world.weight, world.bias)]
        logp, entropy = linear_log_prob(
            *leaves[:2], world.response_ids, bias=leaves[2], temperature=0.8, chunk_tokens=6
        )
        some = torch.linspace(-1, 2, 23, dtype=dtype) * (torch.arange(23) % 4 > 0)
        finite = logp.masked_fill(logp.isinf(), 0.0)
        ((finite.square() * some).sum() + (some * entropy.exp()).sum()).backward()
        return [logp.detach(), entropy.detach(), *(leaf.grad for leaf in leaves)]

    wanted = found()
    monkeypatch.setattr(log_prob, "_row_kernels", lambda head: row_kernels)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for got, right in zip(found(), wanted, strict=True):
        torch.testing.assert_close(got, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.25, -3.0, 0.0])
def test_a_gradient_is_multiplied_where_it_lies(dtype, factor, monkeypatch):
    monkeypatch.setattr(row_kernels.rows, "TIMES_BLOCK", 16)
    value = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = (value.double() * factor).to(dtype)
    row_kernels.multiply(value, torch.tensor(factor))
    assert torch.equal(value, wanted)


def test_only_products_of_16_bits_on_a_gpu_store_and_only_where_memory_was_not_cut_down():
    hidden, weight = torch.zeros(3, 4, device="meta"), torch.zeros(9, 4, device="meta")
    assert stored_tokens(head_spec(hidden, weight, None)) == 0  # no GPU
    for chunk, memory in ((2, "fast"), (None, "minimal")):
        assert not head_spec(hidden, weight, None, chunk_tokens=chunk, memory=memory).may_store
    assert head_spec(hidden, weight, None).may_store
    assert api.HeadLogits is chunk_loop.HeadLogits and kernels.STATISTICS == 8


# ---- with 16-bit products ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [64, 12])
@pytest.mark.parametrize("kind", ["hidden", "top_k", "sampled", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_operands_err_by_roundings_of_the_operands_alone(dtype, kind, stored, store, mixed, monkeypatch):
    """As on a GPU: the store is of the operands' dtype, and of a weight of many entries one product writes the whole gradient."""
    monkeypatch.setattr(chunk_loop, "WHOLE_ENTRIES", 1)
    world = World(23, 64, 129, dtype)
    settings = {"policy": world.policy(torch.float32, old_log_prob=None)} if kind in ("none", "top_k") else {}
    exact = run(world, kind, "reference", torch.float64, grads="hw", **settings)
    store(stored)
    for impl in ("chunked", "triton"):
        mixed.clear()
        found = run(world, kind, impl, dtype, grads="hw", chunk_tokens=6, **settings)
        assert set(mixed) == {dtype}
        assert found["d_weight"].dtype == dtype
        for name in ("d_hidden", "d_weight"):
            error = float((found[name].double() - exact[name]).norm() / exact[name].norm())
            bound = 0.01 if dtype == torch.bfloat16 else 0.0015
            assert error < bound, f"{impl}, {name}: {error:.1e}"

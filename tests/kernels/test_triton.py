"""The Triton row kernels against the definition: on a GPU where there is one, else under Triton's interpreter, on small rows."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import (
    DIVERGENCES,
    ENDS,
    GRADIENTS,
    PARTIAL,
    SAMPLED,
    TAILS,
    WHOLE,
    World,
    assert_as_accurate,
    assert_same,
    named,
    run,
)
from torch import Tensor

from opd.errors import ObjectiveError
from opd.kernels import TeacherMixture, chunk_loop, linear_divergence, linear_objective
from opd.kernels.chunk_loop import HeadLogits, run_chunks
from opd.kernels.rows.autograd import AutogradRows
from opd.kernels.rows.reference import run_whole
from opd.kernels.spec import MASKED, Columns, GradsNeeded, HeadSpec, RowResults, RowSpec, Shards, kind_of
from opd.losses import Objective
from opd.testing import assert_close_to_reference
from opd.types import DenseTarget, Head, HiddenTarget

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux)")
CUDA = torch.cuda.is_available()
with pytest.MonkeyPatch.context() as _patch:
    if not CUDA:
        _patch.setenv("TRITON_INTERPRET", "1")  # kernels are what it says they are from their definition on
    from opd.kernels.rows import triton as implementation
    from opd.kernels.rows.triton import rows

DEVICE = "cuda" if CUDA else "cpu"
FLOAT32, FLOAT64 = torch.float32, torch.float64
EVERY = (
    *DIVERGENCES,
    *ENDS,
    {"divergence": "generalized_jsd", "beta": 0.98},
    {"divergence": "alpha_beta_divergence", "alpha": 1.3, "beta": 0.6},
    {"divergence": "alpha_beta_divergence", "alpha": 0.0, "beta": 0.5},
    {"divergence": "alpha_beta_divergence", "alpha": 1.0, "beta": 0.0},
)
SHAPES = ((1, 3, 1), (4, 5, 2), (7, 8, 17), (3, 5, 33), (2, 16, 129))  # tokens, hidden, vocab

pytestmark = [
    pytest.mark.filterwarnings("ignore:generalized_jsd with normalize=False"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # numpy, on what a mask throws away
]


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if not CUDA:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _only_infinite_rows_are_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunk loop gives rows that came out infinite or NaN to autograd, which would hide most slips of a kernel."""
    again = chunk_loop.loss_by_autograd

    def checked(*arguments: Any, **settings: Any) -> RowResults:
        found = again(*arguments, **settings)
        assert not found.values["loss"].isfinite().any(), "a kernel gave up on a row whose loss is finite"
        return found

    monkeypatch.setattr(chunk_loop, "loss_by_autograd", checked)


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more than 16 entries take several blocks."""
    monkeypatch.setattr(rows, "MAX_BLOCK", 16)
    monkeypatch.setattr(rows, "LANES", 16)


def world_of(*shape: int, **settings: Any) -> World:
    world = World(*shape, **settings)
    world.parts = {name: part.to(DEVICE) for name, part in world.parts.items()}
    return world


def same_as_reference(world: World, kind: str | Callable[[torch.dtype], Any], **settings: Any) -> dict[str, Tensor]:
    """In float64 nothing but rounding is left, so that any slip shows. Returns what the kernels gave."""
    got = run(world, kind, "triton", FLOAT64, chunk_tokens=3, **settings)
    assert_same(got, run(world, kind, "reference", FLOAT64, **settings), 1e-11)
    return got


# ---- divergences over the whole vocabulary -------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", EVERY, ids=named)
def test_every_divergence_is_the_reference_in_float64(divergence):
    for shape in SHAPES:
        same_as_reference(world_of(*shape), "hidden", **divergence)


@pytest.mark.parametrize("divergence", EVERY, ids=named)
def test_every_divergence_errs_no_more_than_the_plain_version_in_float32(divergence):
    for seed, shape in enumerate(SHAPES):
        assert_as_accurate(world_of(*shape, dtype=FLOAT32, seed=seed), "hidden", FLOAT32, impl="triton", **divergence)


@pytest.mark.parametrize("beta", [1e-6, 1e-4, 0.002, 0.02, 0.98, 0.998, 1 - 1e-6])
@pytest.mark.parametrize("name", ["generalized_jsd", "skew_reverse_kl", "skew_forward_kl"])
def test_a_small_weight_in_a_mixture_costs_no_accuracy(name, beta):
    """No allowance for 1/β: log M is never taken where it would have to be divided out again."""
    for seed in range(4):
        world = world_of(5, 8, 33, dtype=FLOAT32, seed=seed)
        settings = {"divergence": name, "beta": beta}
        exact, plain = (run(world, "hidden", "reference", dtype, **settings) for dtype in (FLOAT64, FLOAT32))
        got = run(world, "hidden", "triton", FLOAT32, **settings)
        for output in ("per_token", *GRADIENTS):
            assert_close_to_reference(got[output], plain[output], exact[output], floor=5e-7)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_reverse_kl", "generalized_jsd"])
def test_a_bound_on_a_token_takes_its_loss_and_its_gradient(name):
    world, found = world_of(9, 6, 33), []
    plain = run(world, "hidden", "reference", divergence=name)["per_token"]
    objective = Objective(divergence=name, token_clip=1.001 * float(plain.median()))
    for impl in ("triton", "reference"):
        hidden, weight = (part.clone().requires_grad_() for part in (world.hidden_states, world.weight))
        total, loss, metrics = linear_objective(
            hidden,
            weight,
            world.target("hidden"),
            world.response_ids,
            objective,
            token_weights=world.token_weights,
            bias=world.bias,
            impl=impl,
        )
        slopes = torch.autograd.grad(total, [hidden, weight])
        found.append((loss, metrics["clamped"].to(loss), *slopes))
    assert found[0][1].sum() == 4
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


MOMENTS = (
    *(d for d in EVERY if kind_of(Objective(**d)) not in rows.TWO_READS),
    {"divergence": "generalized_jsd", "beta": 0.5},
)


@pytest.mark.parametrize("divergence", MOMENTS, ids=named)
def test_a_divergence_of_a_millionth_is_known_to_a_percent(divergence):
    """Nothing that nearly cancels is added up; the KLs alone are the difference of two sums, and known to 1e-7."""
    for seed in range(3):
        world = world_of(7, 8, 33, dtype=FLOAT32, closeness=1e-3, seed=seed)
        exact = run(world, "hidden", "reference", FLOAT64, **divergence)["per_token"]
        got = run(world, "hidden", "triton", FLOAT32, **divergence)["per_token"].double()
        assert float(exact.max()) < (2e-3 if divergence["divergence"] == "total_variation" else 2e-5)
        assert float((got - exact).abs().max()) < 0.01 * float(exact.mean())


@pytest.mark.parametrize("divergence", EVERY, ids=named)
def test_a_student_that_is_its_teacher_has_no_gradient(divergence):
    world = world_of(5, 8, 33, dtype=FLOAT32, closeness=0.0)
    got = run(world, "hidden", "triton", FLOAT32, **divergence)
    assert float(got["per_token"].abs().max()) < 2e-7
    assert float(got["d_bias"].abs().max()) < 2e-7


def test_total_variation_by_hand_with_a_tie():
    """p = (½, ¼, ¼) and q = (¼, ½, ¼): f = (½, −½, 0) with mean ⅛, so p (f − ⅛) = (6, −5, −1)/32."""
    student, teacher = torch.tensor([[[2.0, 1.0, 1.0]], [[1.0, 2.0, 1.0]]], dtype=FLOAT64, device=DEVICE).log()
    hidden = student.requires_grad_(True)
    one = torch.eye(3, dtype=FLOAT64, device=DEVICE)
    out = linear_divergence(hidden, one, DenseTarget(logits=teacher), divergence="total_variation", impl="triton")
    out.loss.backward()
    assert hidden.grad is not None
    assert out.loss.item() == pytest.approx(0.25, abs=1e-15)
    assert (32 * hidden.grad).tolist() == [pytest.approx([6.0, -5.0, -1.0], abs=1e-13)]


@pytest.mark.parametrize("divergence", EVERY, ids=named)
def test_logits_far_from_zero_are_as_good_as_any(divergence):
    """e^80 overflows float32 when squared, e^−200 is 0."""
    world = world_of(5, 8, 33, dtype=FLOAT32, offset=80.0, teacher_offset=-200.0)
    assert_as_accurate(world, "hidden", FLOAT32, impl="triton", **divergence)
    same_as_reference(world, "hidden", **divergence, student_temperature=0.7, teacher_temperature=2.0)


@pytest.mark.parametrize("divergence", EVERY, ids=named)
def test_models_that_share_hardly_a_token_stay_finite(divergence):
    """Log-ratios beyond float32's exponent on both sides."""
    world = world_of(4, 8, 33, dtype=FLOAT32, scale=60.0)
    assert_as_accurate(world, "hidden", FLOAT32, impl="triton", **divergence)


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("slope", [-0.5, 0.5, -30.0], ids=["falling", "rising", "steep"])
@pytest.mark.parametrize("divergence", EVERY, ids=named)
def test_rows_of_many_blocks_are_rescaled_when_a_larger_logit_comes(divergence, slope):
    world = world_of(2, 5, 65)
    ramp = slope * torch.arange(65.0, dtype=FLOAT64, device=DEVICE)
    world.parts["bias"] += ramp
    world.parts["teacher_bias"] += ramp.roll(20)  # the two maxima are in different blocks
    same_as_reference(world, "hidden", **divergence, policy=True, entropy_bonus=0.1)


@pytest.mark.parametrize("columns", [1, 2, 3, 16, 17, 8192, 8193, 151936])
def test_a_block_is_the_power_of_two_that_covers_a_row_up_to_the_cap(columns):
    block = rows.block_of(columns, rows.MAX_BLOCK)
    assert block & (block - 1) == 0 and (block == rows.MAX_BLOCK or columns <= block < 2 * columns)


@pytest.mark.parametrize("kind", WHOLE)
def test_every_kind_of_teacher_with_policy_and_entropy(kind):
    for number, divergence in enumerate(DIVERGENCES):
        world = world_of(4, 5, 33, seed=number)
        same_as_reference(world, kind, **divergence, policy=True, entropy_bonus=0.1, distill_weight=0.4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_operands_of_sixteen_bits(dtype):
    for number, divergence in enumerate(DIVERGENCES):
        world = world_of(7, 16, 129, dtype=dtype, seed=number)
        assert_as_accurate(world, "hidden", dtype, impl="triton", **divergence, policy=True, entropy_bonus=0.1)


@pytest.mark.parametrize("grads", ["", "h", "w", "b"])
def test_a_frozen_part_gets_no_gradient_and_changes_nothing(grads):
    world = world_of(5, 5, 17)
    got = same_as_reference(world, "hidden", grads=grads, divergence="generalized_jsd", beta=0.3)
    wanted = {{"h": "d_hidden", "w": "d_weight", "b": "d_bias"}[letter] for letter in grads}
    assert wanted == set(GRADIENTS) & got.keys()


# ---- masks and infinities ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("divergence", EVERY, ids=named)
def test_columns_that_are_no_token_have_probability_exactly_zero(divergence):
    """The first block is masked, some columns between, and the last block is padding."""
    world = world_of(5, 8, 65)
    masked = (*range(16), 20, 33)
    settings = {name: value for name, value in divergence.items() if name != "name"}
    found = []
    for impl in ("reference", "triton"):
        hidden, weight, bias = (
            part.clone().requires_grad_(True) for part in (world.hidden_states, world.weight, world.bias)
        )
        teacher = Head(weight=world.teacher_weight, bias=world.teacher_bias, valid_vocab=60)
        total, loss, _ = linear_objective(
            hidden,
            weight,
            HiddenTarget(hidden=world.teacher_hidden, head=teacher),
            torch.full_like(world.response_ids, 19),
            Objective(**settings),
            token_weights=world.token_weights,
            bias=bias,
            valid_vocab=50,
            masked_ids=masked,
            impl=impl,  # pyright: ignore[reportArgumentType]
        )
        total.backward()
        found.append({"loss": loss, "d_hidden": hidden.grad, "d_weight": weight.grad, "d_bias": bias.grad})
    assert_same(found[1], found[0], 1e-11)
    dead = [*masked, *range(50, 65)]
    assert torch.equal(found[1]["d_bias"][dead], torch.zeros(len(dead), dtype=FLOAT64, device=DEVICE))


@pytest.mark.parametrize("divergence", EVERY, ids=named)
def test_a_teacher_of_minus_infinity_costs_what_it_truly_costs(divergence):
    """Three teacher logits of −inf in rows 0 and 3: +inf for reverse KL, a finite number for most others."""
    world = world_of(6, 5, 17)

    def cut(dtype: torch.dtype) -> DenseTarget:
        logits = world.rounded(world.teacher_logits())
        logits[[0, 3], 2:5] = -torch.inf
        return DenseTarget(logits=logits.to(dtype))

    got = same_as_reference(world, cut, **divergence)
    infinite = got["per_token"].isinf()
    if divergence["divergence"] == "forward_kl":
        assert not infinite.any()
    if divergence["divergence"] == "reverse_kl":
        assert infinite.tolist() == [True, False, False, True, False, False]
    assert all(not value.isnan().any() for value in got.values())


@pytest.mark.parametrize("divergence", EVERY, ids=named)
def test_a_student_of_minus_infinity_costs_what_it_truly_costs(divergence):
    world = world_of(4, 5, 17)
    world.parts["bias"][3:6] = -torch.inf
    world.parts["response_ids"].fill_(7)
    got = same_as_reference(world, "hidden", **divergence, entropy_bonus=0.1)
    if divergence["divergence"] in ("forward_kl", "reverse_kl"):
        assert bool(got["per_token"].isinf().all()) == (divergence["divergence"] == "forward_kl")
    assert all(not value.isnan().any() for value in got.values())


def test_a_teacher_of_weight_zero_has_no_say_even_where_it_is_infinite():
    world = world_of(4, 5, 17)
    world.parts["mixture"] = torch.tensor([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0], [0.0, 1.0]], dtype=FLOAT64).to(DEVICE)

    def two(dtype: torch.dtype) -> TeacherMixture:
        silent = world.rounded(world.teacher_logits())
        silent[[0, 3], 2:5] = -torch.inf
        other = world.target("hidden", dtype)
        targets = (DenseTarget(logits=silent.to(dtype)), other)
        return TeacherMixture(targets=targets, weights=world.mixture.to(dtype), mixture="loss")

    got = same_as_reference(world, two, policy=True, entropy_bonus=0.1)
    assert got["per_token"].isfinite().all()


def test_a_nan_is_not_taken_for_a_masked_logit():
    world = world_of(2, 5, 17, dtype=FLOAT32)
    z = world.logits().float()
    z[1, 4] = torch.nan
    found = run_kernels(world, z, world.teacher_logits().float())
    assert found.values["loss"].isnan().tolist() == [False, True]


def test_a_masked_teacher_logit_under_a_living_one_is_infinite():
    """MASKED is finite, so that it can be subtracted, and must not become a loss of 1e28."""
    world = world_of(2, 5, 17, dtype=FLOAT32)
    t = world.teacher_logits().float()
    t[1, 4] = MASKED
    found = run_kernels(world, world.logits().float(), t)
    assert found.values["loss"].isfinite().tolist() == [True, False]


def run_kernels(world: World, z: Tensor, t: Tensor, **settings: Any) -> RowResults:
    """The row pass alone: the gradient replaces z."""
    _, spec = _request(world, world.target("hidden", FLOAT32), FLOAT32, Objective(**settings))
    chunk = spec.at(slice(0, len(z)), whole_targets=False)
    return rows.TritonRows(spec, z)(chunk, z, [(None, t)], gradient=True)


Request = tuple[HeadSpec, RowSpec]


def _request(world: World, target: Any, dtype: torch.dtype, objective: Objective, **settings: Any) -> Request:
    known: dict[str, Any] = {
        "weight": world.weight.to(dtype),
        "bias": world.bias.to(dtype),
        "vocab": world.vocab,
        "masked_ids": (),
        "shards": Shards(world.vocab),
    } | settings
    columns = Columns(vocab=known.pop("vocab"), masked_ids=known.pop("masked_ids"), shards=known.pop("shards"))
    head = HeadSpec(
        hidden=world.hidden_states.to(dtype),
        weight=known.pop("weight"),
        bias=known.pop("bias"),
        columns=columns,
        token_weights=world.token_weights.to(dtype),
        needs=GradsNeeded(hidden=True, weight=True, bias=True),
        chunk_tokens=3,
    )
    ids = world.response_ids
    return head, RowSpec(columns=columns, target=target, objective=objective, response_ids=ids, **known)


Answer = dict[str, Tensor]


def _run(request: Request) -> Answer:
    """Every row's results and the gradients, by the kernels or, where they are none, by autograd."""
    head, spec = request
    student, row_pass = HeadLogits(head), rows.TritonRows if implementation.has_kernels(spec) else AutogradRows
    return run_chunks(student, spec, row_pass).values | _gradients(student)


def _reference(request: Request) -> Answer:
    student = HeadLogits(request[0])
    return run_whole(student, request[1]).values | _gradients(student)


def _gradients(student: HeadLogits) -> Answer:
    return dict(zip(GRADIENTS, student.gradients(), strict=True))


def _with_gradients(answer: Answer) -> Answer:
    return {name: answer[name] for name in ("loss", *GRADIENTS)}


@pytest.mark.parametrize("divergence", [{"divergence": "reverse_kl"}, {"divergence": "total_variation"}], ids=named)
def test_the_gradient_stays_inside_its_rows(divergence):
    """Rows with a stride of their own, neighbours on all sides."""
    world = world_of(4, 5, 17, dtype=FLOAT32)
    around = torch.full((6, 32), 7.0, device=DEVICE)
    inner = around[1:5, 8:25]
    inner.copy_(world.logits())
    teacher = torch.full((4, 40), torch.nan, device=DEVICE)[:, 3:20].copy_(world.teacher_logits())
    alone = inner.clone()
    run_kernels(world, inner, teacher, **divergence)
    run_kernels(world, alone, teacher.clone(), **divergence)
    assert torch.equal(inner, alone)
    around[1:5, 8:25] = 7.0
    assert bool((around == 7.0).all())


# ---- targets that say little ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", TAILS)
def test_every_tail_of_a_top_k(tail):
    for number, divergence in enumerate(PARTIAL):
        world = world_of(7, 5, 17, seed=number)
        same_as_reference(world, "top_k", **divergence, tail=tail, distill_weight=0.6)
        same_as_reference(world, "top_k", **divergence, tail=tail, policy=True, entropy_bonus=0.1)


@pytest.mark.parametrize("estimator", SAMPLED, ids=named)
def test_estimators_that_see_the_response_token(estimator):
    world = world_of(7, 5, 17)
    same_as_reference(world, "sampled", **estimator)
    same_as_reference(world, "sampled", **estimator, policy=True, entropy_bonus=0.1)


@pytest.mark.parametrize("settings", [{"policy": True}, {"entropy_bonus": 0.2}, {"policy": True, "entropy_bonus": 0.2}])
def test_policy_and_entropy_without_a_teacher(settings):
    for shape in SHAPES:
        same_as_reference(world_of(*shape), "none", **settings)


@pytest.mark.parametrize("kind", ["none", "hidden", "sampled"])
def test_cross_entropy_with_the_response_tokens(kind):
    for shape in SHAPES:
        world = world_of(*shape)
        policy = world.policy(old_log_prob=None, clip_range=None, likelihood=True)
        same_as_reference(world, kind, policy=policy)


@pytest.mark.parametrize("masked", ["by id", "by bias"])
@pytest.mark.parametrize("kind", ["none", "top_k"])
def test_a_token_that_is_masked_has_probability_zero_even_if_it_was_the_response(kind, masked):
    """Its policy gradient is the reference's, not that of a token that the student could emit."""
    world = world_of(3, 5, 17)
    if masked == "by bias":
        world.parts["bias"][4] = -torch.inf
    world.parts["response_ids"][1] = 4
    target = world.target(kind)
    if target is not None:
        target.ids[2, 3] = 4
    request = _request(
        world,
        target,
        FLOAT64,
        Objective(**({"support": "teacher_top_k", "top_k": 4} if target is not None else {})),
        policy=world.policy(old_log_prob=world.old.nan_to_num(neginf=-3.0)),
        masked_ids=(4,) if masked == "by id" else (),
    )
    got, wanted = _run(request), _reference(request)
    assert_same(_with_gradients(got), _with_gradients(wanted), 1e-11)
    assert got["student_logp"].isinf().tolist() == [False, True, False]


# ---- objectives without kernels ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [
        {"teacher_logp_floor": -3.0},
        {"support": "student_top_k", "top_k": 4},
        {"support": "union", "top_k": 4},
    ],
    ids=named,
)
def test_objectives_without_kernels_go_through_autograd(objective):
    world = world_of(5, 5, 17)
    request = _request(world, world.target("hidden"), FLOAT64, Objective(**objective))
    assert not implementation.has_kernels(request[1])
    got, wanted = (_with_gradients(run_with(request)) for run_with in (_run, _reference))
    assert_same(got, {name: wanted[name] for name in got}, 1e-11)


@pytest.mark.skipif(CUDA, reason="there is a GPU to run on")
def test_kernels_that_were_not_made_for_the_interpreter_refuse_a_cpu(monkeypatch):
    monkeypatch.setattr(rows, "INTERPRETED", False)
    world = world_of(2, 5, 17)
    with pytest.raises(ObjectiveError, match="before the first import"):
        linear_divergence(world.hidden_states, world.weight, world.target("hidden"), impl="triton")


# ---- a vocabulary in several places --------------------------------------------------------------------------------


class Meeting(Shards):
    """A rank in a thread. One at a time runs; at a reduction it waits for the others."""

    def __init__(self, sizes: list[int], rank: int, lock: threading.Lock, barrier: threading.Barrier, table: list):
        super().__init__(sizes[rank])
        self.group, self.sizes, self.offset = "threads", sizes, sum(sizes[:rank])
        self.rank, self.lock, self.barrier, self.table = rank, lock, barrier, table
        self.messages = 0

    def _reduce(self, parts: tuple[Tensor, ...], operation: Any) -> tuple[Tensor, ...]:
        self.messages += 1
        everyone = self._meet(torch.stack([part.contiguous() for part in parts]))
        largest = operation == torch.distributed.ReduceOp.MAX
        return (torch.stack(everyone).amax(0) if largest else torch.stack(everyone).sum(0)).unbind(0)

    def gather_columns(self, logits: Tensor) -> Tensor:
        return torch.cat(self._meet(logits.clone()), dim=-1)

    def _meet(self, message: Tensor) -> list[Tensor]:
        self.table[self.rank] = message
        self.lock.release()
        try:
            self.barrier.wait(timeout=60)
            everyone = list(self.table)
            self.barrier.wait(timeout=60)
        finally:
            self.lock.acquire()
        return everyone


def over_shards(sizes: list[int], request_of: Callable[[Shards], Request]) -> tuple[dict[str, Tensor], int]:
    """What the ranks computed, their gradients of the weight in order, and the number of messages each sent."""
    lock, barrier, table = threading.Lock(), threading.Barrier(len(sizes)), [None] * len(sizes)
    shards = [Meeting(sizes, rank, lock, barrier, table) for rank in range(len(sizes))]
    answers: list[Any] = [None] * len(sizes)

    def rank(number: int) -> None:
        with lock, warnings.catch_warnings():
            try:
                answers[number] = _run(request_of(shards[number]))
            except BaseException as error:
                answers[number] = error
                barrier.abort()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    split = ("d_weight", "d_bias")
    for answer in answers[1:]:
        assert_same(*({name: v for name, v in one.items() if name not in split} for one in (answer, answers[0])), 0.0)
        assert torch.equal(answer["d_hidden"], answers[0]["d_hidden"])
    whole = answers[0] | {name: torch.cat([answer[name] for answer in answers]) for name in split}
    return whole, max(shard.messages for shard in shards)


def shard_requests(world: World, kind: str, objective: Objective, **settings: Any) -> Callable[[Shards], Request]:
    def of(shards: Shards) -> Request:
        columns = slice(shards.offset, shards.offset + shards.size)
        target = world.target(kind)
        if isinstance(target, HiddenTarget):
            assert target.head.bias is not None
            head = Head(weight=target.head.weight[columns], bias=target.head.bias[columns])
            target = HiddenTarget(hidden=target.hidden, head=head)
        parts = {"weight": world.weight[columns], "bias": world.bias[columns], "shards": shards}
        return _request(world, target, FLOAT64, objective, **(settings | parts))

    return of


SPLIT = (
    *(("hidden", divergence) for divergence in EVERY),
    *(("top_k", {"support": "teacher_top_k", "top_k": 4, "tail": tail}) for tail in TAILS),
)


@pytest.mark.parametrize(("kind", "settings"), SPLIT, ids=lambda value: named(value) if isinstance(value, dict) else value)  # fmt: skip
def test_a_vocabulary_in_two_places_is_one_vocabulary(kind, settings):
    """Unequal parts, the second one half padding, and a student logit of −inf: the answers are those of the reference."""
    world = world_of(5, 6, 40)
    ramp = 0.2 * torch.arange(40.0, dtype=FLOAT64, device=DEVICE)
    world.parts["bias"] += ramp
    world.parts["teacher_bias"] -= ramp  # the largest logits are on different ranks
    world.parts["response_ids"] %= 30
    more = {"policy": world.policy(), "entropy_bonus": 0.1, "vocab": 30, "masked_ids": (0, 25)}
    world.parts["response_ids"].clamp_(1, 24)
    requests = shard_requests(world, kind, Objective(**settings), **more)
    got, messages = over_shards([17, 23], requests)
    whole = _reference(requests(Shards(40)))
    assert_same(got, {name: whole[name] for name in got}, 1e-11)
    chunks, hidden_grad, maxima = 2, 1, 1
    if kind == "top_k":
        picks, sums = 2, 1  # the top-k's logits and the response token's; the normalisers and entropies
    else:
        picks, sums = 1, 1 if kind_of(Objective(**settings)) in rows.TWO_READS else 2
    assert messages == chunks * (picks + maxima + sums) + hidden_grad


def test_a_rank_whose_columns_are_all_padding_adds_nothing():
    world = world_of(5, 6, 40)
    world.parts["response_ids"] %= 16
    for divergence in EVERY:
        requests = shard_requests(world, "hidden", Objective(**divergence), vocab=16)
        got, _ = over_shards([16, 24], requests)
        whole = _reference(requests(Shards(40)))
        assert_same(got, {name: whole[name] for name in got}, 1e-11)

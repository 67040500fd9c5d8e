"""In the dtypes of training, a fast version errs at most twice as much as the plain one, and one rounding of a logit."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import (
    CLOSED,
    DIVERGENCES,
    ENDS,
    GRADIENTS,
    NEAR_ENDS,
    PARTIAL,
    SAMPLED,
    TAILS,
    WHOLE,
    World,
    assert_as_accurate,
    assert_digits_survive,
    named,
    run,
)
from pairwise_cases import pairwise

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
TOKENS, HIDDEN, VOCAB = (1, 7, 33), (1, 5, 64), (2, 17, 129, 1003)
CLOSE = (0.05, 1e-3)  # KL ≈ 0.005, where distillation ends, and ≈ 1e-6

pytestmark = pytest.mark.filterwarnings("ignore:generalized_jsd with normalize=False")


def shapes(number: int) -> list[tuple[int, int, int]]:
    """A third of every size of each dimension with every size of each other; three numbers in a row see all of them."""
    pairs = [(i, tokens, j, vocab) for i, tokens in enumerate(TOKENS) for j, vocab in enumerate(VOCAB)]
    return [(tokens, HIDDEN[(i + j) % 3], vocab) for i, tokens, j, vocab in pairs if (i + j + number) % 3 == 0]


@pairwise(divergence=DIVERGENCES + ENDS, dtype=(FLOAT32, BFLOAT16), tokens=TOKENS, hidden=HIDDEN, vocab=VOCAB)
def test_every_divergence_at_odd_shapes(divergence, dtype, tokens, hidden, vocab):
    world = World(tokens, hidden, vocab, dtype, seed=tokens + vocab)
    assert_as_accurate(world, "hidden", dtype, **divergence)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("kind", WHOLE)
def test_every_kind_of_teacher_with_logits(kind, dtype):
    for number, divergence in enumerate(DIVERGENCES):
        for tokens, hidden, vocab in shapes(number):
            world = World(tokens, hidden, vocab, dtype, seed=number)
            assert_as_accurate(world, kind, dtype, **divergence, policy=True, entropy_bonus=0.1)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("tail", TAILS)
def test_every_tail_of_a_top_k(tail, dtype):
    for number, divergence in enumerate(PARTIAL):
        for tokens, hidden, vocab in shapes(number):
            if vocab > 2:
                world = World(tokens, hidden, vocab, dtype, seed=number)
                assert_as_accurate(world, "top_k", dtype, **divergence, tail=tail, entropy_bonus=0.1)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16], ids=str)
def test_estimators_that_see_the_response_token(dtype):
    for number, estimator in enumerate(SAMPLED * 2):
        for tokens, hidden, vocab in shapes(number):
            assert_as_accurate(World(tokens, hidden, vocab, dtype), "sampled", dtype, **estimator, policy=True)


@pairwise(divergence=DIVERGENCES, dtype=(FLOAT32, BFLOAT16), closeness=CLOSE)
def test_a_student_that_is_nearly_the_teacher(divergence, dtype, closeness):
    for tokens, hidden, vocab in ((7, 5, 17), (33, 64, 1003)):
        # in bfloat16 the smallest step is 2⁻⁹ of a number: nothing closer than that can be said in it
        step = closeness if dtype == FLOAT32 else max(closeness, 0.02)
        world = World(tokens, hidden, vocab, dtype, closeness=step)
        for kind in ("hidden", "probability") if dtype == FLOAT32 else ("hidden",):
            assert_as_accurate(world, kind, dtype, **divergence)


@pytest.mark.parametrize("impl", ["chunked", "minimal"])
@pytest.mark.parametrize("settings", NEAR_ENDS, ids=named)
def test_a_mixture_near_the_ends_of_beta_keeps_its_digits(settings, impl):
    """log M would be all but one model's log-prob there, and what it lost divided by the small weight: eps/β, or eps/β²."""
    for closeness in (None, 0.1):
        world = World(6, 8, 501, FLOAT32, closeness=closeness)
        for extra in ({}, {"policy": True, "entropy_bonus": 0.0}):
            if extra and settings["divergence"] != "generalized_jsd":
                continue  # the policy term's rounding is not small beside a divergence of size β²
            assert_digits_survive(world, FLOAT32, impl, 1e-5, **settings, **extra)


def test_near_the_teacher_means_what_it_says():
    for closeness, wanted in zip(CLOSE, (5e-3, 1e-6), strict=True):
        found = run(World(33, 64, 1003, FLOAT32, closeness=closeness), "hidden", "reference")["per_token"].mean()
        assert wanted / 3 < found < wanted * 3


def test_a_teacher_that_is_the_student_gives_exactly_0_in_reverse_kl():
    world = World(33, 64, 1003, FLOAT32, closeness=0.0)
    for dtype in (FLOAT32, BFLOAT16):
        for impl in ("reference", "chunked"):
            found = run(world, "hidden", impl, dtype, chunk_tokens=16)
            assert not found["per_token"].any()
            assert impl == "reference" or not any(found[name].any() for name in GRADIENTS)


def test_near_the_teacher_the_gradient_of_a_kl_has_four_digits():
    """Rounding the logits to 16 bits would leave none: 27% are lost at KL = 0.006."""
    world = World(33, 64, 1003, FLOAT32, closeness=0.05)
    for divergence in ({"divergence": "reverse_kl"}, {"divergence": "forward_kl"}, {"divergence": "generalized_jsd"}):
        exact, fast = (run(world, "hidden", impl, dtype, **divergence) for impl, dtype in (("reference", torch.float64), ("chunked", FLOAT32)))  # fmt: skip
        for name in GRADIENTS:
            assert (fast[name] - exact[name]).norm() <= 1e-4 * exact[name].norm()


# --- ranges -----------------------------------------------------------------------------------------------------------


OFFSETS = ((60.0, None), (-150.0, None), (35.0, None), (-18.0, None), (60.0, -150.0), (-150.0, 0.0), (0.0, 60.0))


@pairwise(divergence=DIVERGENCES + ENDS, offsets=OFFSETS, kind=("hidden", "dense"))
def test_logits_with_a_common_offset(divergence, offsets, kind):
    """Softmax does not see an offset; sums of e^z do: 60 leaves float32's range, −150 vanishes in it, 35 and −18 just stay."""
    world = World(7, 5, 129, FLOAT32, offset=offsets[0], teacher_offset=offsets[1])
    assert_as_accurate(world, kind, FLOAT32, **divergence, policy=True, entropy_bonus=0.1)


@pytest.mark.parametrize("kind", ["probability", "logit", "loss", "top_k", "sampled", "none"])
def test_logits_with_a_common_offset_under_every_other_target(kind):
    for offset, teacher_offset in ((60.0, None), (-150.0, None), (60.0, -150.0), (0.0, 60.0)):
        world = World(7, 5, 129, FLOAT32, offset=offset, teacher_offset=teacher_offset)
        assert_as_accurate(world, kind, FLOAT32, policy=True, entropy_bonus=0.1)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=named)
def test_rows_in_and_out_of_range_in_one_chunk(divergence):
    """The rows out of range are done again; those in range and the chunks after them stay as good as they were."""
    world = World(21, 6, 129, FLOAT32)
    far = torch.zeros(21, dtype=torch.float64)
    far[2], far[4], far[9] = 80.0, -120.0, 300.0
    world.parts["hidden"][:, 0] = far
    world.parts["weight"][:, 0] = 1.0
    for kind in ("hidden", "dense", "loss"):
        assert_as_accurate(world, kind, FLOAT32, **divergence, policy=True)
    world.parts["teacher_hidden"][:, 0] = far.flip(0)
    world.parts["teacher_weight"][:, 0] = 1.0
    for kind in ("hidden", "probability"):
        assert_as_accurate(world, kind, FLOAT32, **divergence)


@pytest.mark.parametrize("scale", [8.0, 40.0])
@pytest.mark.parametrize("divergence", CLOSED + ENDS, ids=named)
def test_peaked_distributions(divergence, scale):
    """Logits tens of nats apart: most probabilities vanish in float32, and their logarithms must not.

    Operands of eight bits have products that float32 holds, so that the order in which a library adds them hardly matters.
    """
    for shape in ((7, 5, 129), (33, 64, 1003)):
        assert_as_accurate(World(*shape, BFLOAT16, scale=scale), "hidden", FLOAT32, **divergence)


def test_temperatures():
    for student, teacher in ((0.5, 1.0), (1.0, 3.0), (2.0, 0.7)):
        for kind in ("hidden", "dense", "logit"):
            for dtype in (FLOAT32, BFLOAT16):
                temperatures = {"student_temperature": student, "teacher_temperature": teacher}
                assert_as_accurate(World(7, 5, 129, dtype), kind, dtype, **temperatures, policy=True)


def test_float16_gradients_survive_a_loss_scale_that_float16_cannot_hold():
    """The scale 2¹⁷ is beyond float16, a gradient of 1e-3 times it is not."""
    world = World(7, 5, 17, FLOAT16, closeness=0.05)
    world.parts["token_weights"] *= 1e-3
    exact = run(world, "hidden", "reference", torch.float64)
    scaled = run(world, "hidden", "chunked", FLOAT16, scale=2.0**17)
    for name in GRADIENTS:
        assert scaled[name].isfinite().all()
        torch.testing.assert_close(scaled[name].double(), exact[name] * 2.0**17, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "divergence", [{"divergence": "reverse_kl"}, {"divergence": "generalized_jsd", "beta": 0.3}], ids=named
)
def test_rows_of_a_released_model_keep_the_digits_of_their_sums(divergence):
    """Entropies and divergences of 152k columns: a sum that runs through them one by one is off by tens of roundings."""
    world = World(3, 8, 151_936, BFLOAT16)
    assert_as_accurate(world, "hidden", FLOAT32, sum_depth=math.log2(world.vocab), **divergence)

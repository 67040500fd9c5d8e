"""memory="minimal": blocks of the vocabulary instead of whole rows, and the same numbers."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    CLOSED,
    ENDS,
    GRADIENTS,
    OUTPUTS,
    SAMPLED,
    TAILS,
    Products,
    World,
    assert_as_accurate,
    assert_same,
    named,
    run,
)
from pairwise_cases import pairwise

from opd.errors import ObjectiveError
from opd.kernels import linear_divergence, linear_objective, minimal
from opd.losses import Objective
from opd.types import DenseTarget

WORLD = World(23, 7, 37)
EXTRAS = (
    {},
    {"student_temperature": 1.7, "policy": True},
    {"policy": True, "entropy_bonus": 0.1, "distill_weight": 0.4, "student_temperature": 0.7},
)

pytestmark = pytest.mark.filterwarnings("ignore:generalized_jsd with normalize=False")


@pytest.fixture(autouse=True)
def _blocks_of_nine(monkeypatch):
    """Five blocks, the last of one column."""
    monkeypatch.setattr(minimal, "BLOCK_BYTES", 1)
    monkeypatch.setattr(minimal, "MIN_WIDTH", 9)


def both(kind, world: World = WORLD, tolerance: float = 1e-12, dtype: torch.dtype = torch.float64, **settings) -> None:
    for chunk in (5, None):
        wanted = run(world, kind, "reference", dtype, **settings)
        got = run(world, kind, "minimal", dtype, chunk_tokens=chunk, **settings)
        for name, value in wanted.items():
            assert torch.equal(got[name].isinf(), value.isinf()), name
            got[name], wanted[name] = (part.nan_to_num(nan=9e9, posinf=0.0, neginf=0.0) for part in (got[name], value))
        assert_same(got, wanted, tolerance)


@pairwise(divergence=CLOSED + ENDS, extra=EXTRAS, kind=("hidden", "dense"), teacher_temperature=(1.0, 1.4))
def test_blocks_of_whole_teachers_give_the_plain_numbers(divergence, extra, kind, teacher_temperature):
    both(kind, **divergence, **extra, teacher_temperature=teacher_temperature)


@pairwise(tail=TAILS, divergence=(*CLOSED, {"divergence": "total_variation"}), extra=EXTRAS)
def test_blocks_of_a_top_k_give_the_plain_numbers(tail, divergence, extra):
    both("top_k", **divergence, **extra, tail=tail)


def test_blocks_of_everything_else_give_the_plain_numbers():
    for extra in EXTRAS:
        for estimator in SAMPLED:
            both("sampled", **estimator, **extra)
    both("none", policy=True)
    both("none", entropy_bonus=0.2)
    both("none", policy=True, entropy_bonus=0.2, student_temperature=1.4)


@pytest.mark.parametrize("grads", ["h", "w", "b", "hw", ""])
def test_frozen_parts_get_no_gradient(grads):
    for kind in ("hidden", "top_k"):
        both(kind, grads=grads, policy=True, entropy_bonus=0.1)
        both(kind, grads=grads, bias=False, divergence="generalized_jsd")


def test_masked_padded_and_uncounted_are_left_out():
    weights = WORLD.token_weights * (torch.arange(23) % 3 != 1)
    ids = WORLD.response_ids % 20
    for kind in ("hidden", "dense"):
        both(kind, token_weights=weights, policy=True)
        both(kind, valid_vocab=20, response_ids=ids, divergence="generalized_jsd")
        both(kind, token_weights=torch.zeros(23, dtype=torch.float64), policy=True)
    both("hidden", World(0, 7, 37))
    both("hidden", World(5, 1, 37), divergence="generalized_jsd")


def test_infinities_sit_where_they_should():
    made = World(11, 5, 19)
    made.parts["response_ids"] = torch.full((11,), 3)
    never = torch.tensor([2, 7])

    def dense(dtype: torch.dtype) -> DenseTarget:
        logits = made.teacher_logits().nan_to_num(neginf=0.0).to(dtype)
        return DenseTarget(logits=logits.index_fill(-1, never, -torch.inf))

    for student in (False, True):
        if student:
            made.parts["bias"][never] = -torch.inf
        for divergence in CLOSED + ENDS:
            both(dense, made, **divergence, entropy_bonus=0.1)
            both("hidden", made, **divergence, policy=made.policy(old_log_prob=None))
    for tail in TAILS:
        both("top_k", made, tail=tail)
    both("none", made, entropy_bonus=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", CLOSED, ids=named)
def test_blocks_are_as_accurate_as_rows(monkeypatch, divergence, dtype):
    monkeypatch.setattr(minimal, "MIN_WIDTH", 100)
    for offset in (0.0, 60.0, -150.0):
        for shape in ((7, 5, 129), (33, 64, 1003)):
            world = World(*shape, dtype, offset=offset)
            assert_as_accurate(world, "hidden", dtype, "minimal", **divergence, policy=True)
    assert_as_accurate(World(33, 64, 1003, dtype, closeness=0.05), "hidden", dtype, "minimal", **divergence)
    assert_as_accurate(World(33, 64, 1003, dtype, scale=40.0), "hidden", dtype, "minimal", **divergence)


@pytest.mark.parametrize(
    ("kind", "divergence", "grads", "student", "teacher"),
    [("hidden", "reverse_kl", "hwb", 4, 2), ("hidden", "forward_kl", "hwb", 4, 2), ("hidden", "generalized_jsd", "hwb", 4, 2),
     ("hidden", "skew_reverse_kl", "hwb", 4, 2), ("hidden", "skew_forward_kl", "hwb", 4, 2), ("hidden", "generalized_jsd", "h", 3, 2),
     ("hidden", "reverse_kl", "h", 3, 2), ("dense", "reverse_kl", "hwb", 4, 0), ("dense", "generalized_jsd", "hwb", 4, 0),
     ("top_k", "reverse_kl", "hwb", 4, 0), ("sampled", "reverse_kl", "hwb", 4, 0)],
)  # fmt: skip
def test_products_are_as_many_as_promised(kind, divergence, grads, student, teacher):
    """Six for every divergence, of which two with the teacher's hidden size; one fewer where the weight is frozen."""
    world = World(23, 16, 37)
    target, depth = world.target(kind), world.parts["teacher_hidden"].shape[1]
    for chunk in (9, None):
        with Products() as seen:
            run(world, lambda _: target, "minimal", grads=grads, divergence=divergence, policy=True, chunk_tokens=chunk)
        assert seen.multiplications == 23 * 37 * (student * 16 + teacher * depth)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("probability", {}), ("loss", {}), ("hidden", {"divergence": "total_variation"}), ("dense", {"divergence": "alpha_beta_divergence"})],
)  # fmt: skip
def test_what_blocks_cannot_do_is_refused_with_what_can(kind, settings):
    with pytest.raises(ObjectiveError, match=r"memory='minimal' takes one teacher.*use memory='fast'"):
        run(WORLD, kind, "minimal", **settings)
    for impl in ("reference", "triton"):
        with pytest.raises(ObjectiveError, match="memory='minimal' is an implementation of its own; use impl='auto'"):
            linear_divergence(WORLD.hidden_states, WORLD.weight, WORLD.target("hidden"), impl=impl, memory="minimal")


def test_results_do_not_depend_on_the_blocks(monkeypatch):
    wanted = run(WORLD, "hidden", "minimal", policy=True, entropy_bonus=0.1)
    for width in (1, 2, 36, 37, 64):
        monkeypatch.setattr(minimal, "MIN_WIDTH", width)
        found = run(WORLD, "hidden", "minimal", policy=True, entropy_bonus=0.1)
        assert_same(found, wanted)
        assert {*GRADIENTS, *OUTPUTS} <= found.keys()


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        ("hidden", Objective()),
        ("dense", Objective(divergence="generalized_jsd", student_temperature=1.4)),
        ("hidden", Objective(divergence="forward_kl", student_temperature=2.0, teacher_temperature=2.0, scale_by_t2=True)),
        ("top_k", Objective(support="teacher_top_k", top_k=3)),
        ("sampled", Objective(support="sampled", estimator="k1", delivery="advantage", discount=0.9)),
        ("none", Objective()),
    ],
    ids=["reverse_kl", "jsd", "forward_kl", "top_k", "returns", "reward"],
)  # fmt: skip
def test_an_objective_has_the_same_losses_metrics_and_gradients(kind, objective):
    """Some tokens have weight 0 and are reported all the same."""
    ids, found = WORLD.response_ids.clamp(max=25), []
    ids[(ids == 3) | (ids == 11)] = 12
    target = WORLD.target(kind)
    if kind == "top_k":
        target.ids.clamp_(max=25)
    policy = None if objective.discount else WORLD.policy()
    for memory in ("fast", "minimal"):
        leaves = [part.clone().requires_grad_() for part in (WORLD.hidden_states, WORLD.weight, WORLD.bias)]
        total, loss, metrics = linear_objective(
            leaves[0], leaves[1], target, ids, objective, bias=leaves[2], policy=policy, memory=memory,
            token_weights=WORLD.token_weights * (torch.arange(23) % 4 != 0), valid_vocab=30, masked_ids=(3, 11),
            sampler_logp=WORLD.old, sequence_index=torch.arange(23) // 6, eos_ids=(4, 29, 36), chunk_tokens=9,
        )  # fmt: skip
        total.backward()
        grads = dict(zip(GRADIENTS, (leaf.grad for leaf in leaves), strict=True))
        found.append({"sum": total.detach(), "loss": loss, **metrics, **grads})
    assert {"student_entropy", "eos_prob"} <= found[0].keys()
    assert_same(found[1], found[0])

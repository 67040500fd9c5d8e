"""What autocast means for an output layer of float32: operands are rounded, sums and logits are not."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import World
from torch.utils._python_dispatch import TorchDispatchMode

from opd.kernels import Impl, chunk_loop, linear_divergence, linear_objective
from opd.losses import Objective
from opd.types import Head, HiddenTarget

BFLOAT16 = torch.bfloat16


class Operands(TorchDispatchMode):
    """The operands of matrix products that reach over the vocabulary, as they are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.results: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func.name().split("::")[1].split(".")[0] in ("mm", "addmm", "addmm_"):
            left, right = [a for a in args if isinstance(a, torch.Tensor)][-2:]
            self.seen.append((left.clone(), right.clone()))
            self.results.append(out.dtype)
        return out


def is_bfloat16(value: torch.Tensor) -> bool:
    return torch.equal(value, value.to(BFLOAT16).to(value.dtype))


def losses(world: World, impl: Impl, *, rounded: bool, **settings) -> dict[str, torch.Tensor]:
    """Under autocast; or, `rounded`, without it and with student tensors that are rounded by hand."""
    hidden, weight, bias = (part.float() for part in (world.hidden_states, world.weight, world.bias))
    if rounded:
        hidden, weight = hidden.to(BFLOAT16).float(), weight.to(BFLOAT16).float()
    leaves = [part.clone().requires_grad_() for part in (hidden, weight, bias)]
    with torch.autocast("cpu", dtype=BFLOAT16, enabled=not rounded):
        total, per_token, metrics = linear_objective(
            *leaves[:2], world.target("hidden", torch.float32), world.response_ids, Objective(**settings), bias=leaves[2],
            token_weights=world.token_weights.float(), sequence_index=torch.arange(23) // 5, chunk_tokens=8, impl=impl,
        )  # fmt: skip
    total.backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves)
    return {"loss": per_token, **metrics, **{name: leaf.grad for name, leaf in zip("hwb", leaves, strict=True)}}  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"divergence": "generalized_jsd"},
        {"support": "union", "top_k": 3},
        {"support": "sampled", "estimator": "k1", "delivery": "advantage", "discount": 0.5},
    ],
    ids=["reverse KL", "JSD", "union", "discount"],
)
def test_it_rounds_the_students_operands_and_nothing_else(settings, impl):
    world = World(23, 64, 129, torch.float32)
    found, wanted = losses(world, impl, rounded=False, **settings), losses(world, impl, rounded=True, **settings)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert not is_bfloat16(found["w"]) and not is_bfloat16(found["h"]), "an accumulated gradient was rounded"


def test_the_operands_of_the_logits_are_bfloat16_and_the_teachers_are_its_own():
    world = World(23, 64, 129, torch.float32)
    hidden, weight = world.hidden_states.float().requires_grad_(), world.weight.float().requires_grad_()
    teacher = HiddenTarget(hidden=world.teacher_hidden.float(), head=Head(weight=world.teacher_weight.float()))
    with torch.autocast("cpu", dtype=BFLOAT16), Operands() as seen:
        linear_objective(hidden, weight, teacher, world.response_ids, Objective(), token_weights=torch.ones(23))
    (student, theirs, d_hidden, d_weight) = seen.seen
    assert is_bfloat16(student[0]) and is_bfloat16(student[1])
    assert not is_bfloat16(theirs[0]) and not is_bfloat16(theirs[1])
    assert is_bfloat16(d_hidden[1])
    assert d_weight[1].shape == hidden.shape
    assert set(seen.results) == {torch.float32}, "logits and sums are never rounded"


def test_without_autocast_float32_operands_are_left_alone():
    world = World(23, 64, 129, torch.float32)
    hidden, weight = world.hidden_states.float().requires_grad_(), world.weight.float().requires_grad_()
    with Operands() as seen:
        linear_objective(hidden, weight, world.target("dense", torch.float32), world.response_ids, Objective(), token_weights=torch.ones(23))  # fmt: skip
    assert not is_bfloat16(seen.seen[0][0]) and not is_bfloat16(seen.seen[0][1])


def test_operands_of_16_bits_and_of_64_are_their_own_under_autocast():
    for dtype in (BFLOAT16, torch.float16, torch.float64):
        world = World(23, 64, 129, dtype)
        hidden, weight, target = world.hidden_states.to(dtype), world.weight.to(dtype), world.target("hidden", dtype)
        ids, ones = world.response_ids, torch.ones(23)
        plain = linear_objective(hidden, weight, target, ids, Objective(), token_weights=ones)[1]
        with torch.autocast("cpu", dtype=BFLOAT16):
            assert torch.equal(linear_objective(hidden, weight, target, ids, Objective(), token_weights=ones)[1], plain)


@pytest.mark.parametrize("told", ["high", "medium"])
def test_tf32_is_for_others_and_is_told_what_it_was_afterwards(told):
    """PyTorch's two settings for it: the older one for every device, the newer for each."""
    seen = []

    class Watching(Operands):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append((torch.get_float32_matmul_precision(), torch.backends.mkldnn.matmul.fp32_precision))
            return super().__torch_dispatch__(func, types, args, kwargs)

    world = World(8, 4, 17, torch.float32)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(told)
        own = torch.backends.mkldnn.matmul.fp32_precision
        hidden = world.hidden_states.float().requires_grad_()
        with Watching():
            linear_divergence(hidden, world.weight.float(), world.target("hidden", torch.float32)).loss.backward()
        assert ("highest", "ieee") in seen
        assert torch.get_float32_matmul_precision() == told and torch.backends.mkldnn.matmul.fp32_precision == own
    finally:
        torch.set_float32_matmul_precision(before)


def test_tf32_by_the_newer_setting_alone_is_put_back_too():
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "tf32"
        with chunk_loop.exact_float32(torch.device("cuda")):
            assert backend.fp32_precision == "ieee"
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = "ieee" if before == "none" else before

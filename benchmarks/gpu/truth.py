"""Losses and gradients on the device against float64: the worlds and the bounds are those of the tests in tests/kernels."""

from __future__ import annotations

import math
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu.sheet import CheckFailed, Sheet
from opd.kernels import linear_divergence, linear_log_prob, linear_objective
from opd.losses import Objective
from opd.types import DenseTarget

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "kernels"))  # by path: `tests` may be anybody's package
from kernel_cases import (  # pyright: ignore[reportMissingImports]
    CLOSED,
    DIVERGENCES,
    ENDS,
    PARTIAL,
    SAMPLED,
    TAILS,
    WHOLE,
    Settings,
    World,
    assert_as_accurate,
    named,
)

SHAPES = {  # tokens, hidden, vocab
    "odd": (67, 24, 1009),
    "one token": (1, 40, 515),
    "8193 tokens": (8193, 16, 331),
    "152k": (48, 64, 151_936),
}
SMALL = {"odd": (7, 8, 37), "one token": (1, 5, 19), "8193 tokens": (33, 4, 21), "152k": (3, 4, 131)}
MODELS: dict[str, Settings] = {
    "unrelated": {},
    "nearly equal": {"closeness": 0.01},
    "peaked": {"scale": 12.0},
    "far from 0": {"offset": 60.0},
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16, "float64": torch.float64}
MANY_COLUMNS = 10_000
"""Beyond it, what a sum of so many numbers rounds is added to the bounds of values, not of gradients."""
REHEARSED_EVERY = 53
"""Of the grid's cases, in a rehearsal: coprime to the lengths of its lists, so that every list is reached."""
HYBRID = {"policy": True, "distill_weight": 0.6, "entropy_bonus": 0.02}
ROUNDINGS = 64
"""Of float32, relative to the largest entry: what two right ways to add the same numbers may differ by, several times over."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call, to be compared with the same call in float64."""

    shape: str
    model: str
    dtype: str
    impl: str
    kind: str
    settings: tuple[tuple[str, Any], ...]

    @property
    def group(self) -> tuple[str, str, str]:
        return self.impl, self.kind, self.dtype


def measure(sheet: Sheet) -> None:
    warnings.filterwarnings("ignore", message="generalized_jsd with normalize=False")
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
    accuracy(sheet, "triton")
    for name, objective in OBJECTIVES.items():
        sheet.case("any objective, as the trainer calls it", name, partial(trainer_loss, sheet, objective), judged=True)
    for name, surrounding in AROUND.items():
        sheet.case("inside other machinery", name, partial(surrounding, sheet), judged=True, seconds=20)
    accuracy(sheet, "chunked")


def accuracy(sheet: Sheet, impl: str) -> None:
    """The grid of an implementation, a row of the table per kind of target and dtype."""
    groups: dict[tuple[str, str, str], list[Case]] = defaultdict(list)
    for case in grid(sheet.rehearse):
        if case.impl == impl:
            groups[case.group].append(case)
    needs = ("triton",) if impl == "triton" else ()
    for (_, kind, dtype), cases in groups.items():
        sheet.case(
            "against float64", f"{impl}, {kind}, {dtype}", partial(check, sheet, cases), judged=True, needs=needs
        )


def check(sheet: Sheet, cases: list[Case]) -> dict[str, Any]:
    """Every case within twice the plain version's error and one rounding of each logit, as tests/kernels/kernel_cases.py derives it."""
    failures, done = [], 0
    for case in cases:
        if sheet.left < 1:
            break
        done += 1
        made = world(case.shape, case.model, case.dtype, str(sheet.device), sheet.rehearse)
        kinds = {"dense with −inf": partial(_ruled_out, made), "hybrid": "hidden"}
        try:
            assert_as_accurate(
                made,
                kinds.get(case.kind, case.kind),
                DTYPES[case.dtype],
                case.impl,
                sum_depth=math.log2(made.vocab) if made.vocab > MANY_COLUMNS else 0.0,
                **dict(case.settings),
            )
        except AssertionError as error:
            failures.append(f"{case.shape}, {case.model}, {named(dict(case.settings))}: {str(error)[:160]}")
    cells = {"cases": len(cases), "run": done, "held": done - len(failures)}
    if failures:
        raise CheckFailed(f"{len(failures)} beyond the bound; first {failures[0]}", cells)
    if done < len(cases):
        raise CheckFailed(f"the time was over after {done} of {len(cases)} cases.", cells)
    return cells


def grid(rehearse: bool) -> Iterator[Case]:
    """All divergences with all kinds of target and dtypes at one shape; the other shapes and kinds of model pairwise."""

    def cases() -> Iterator[Case]:
        for impl in ("triton", "chunked"):
            for dtype in ("bfloat16", "float32", "float16"):
                yield from _cases(impl, dtype, "odd", "unrelated")
            for dtype in ("bfloat16", "float32"):
                for shape, model in (
                    ("8193 tokens", "nearly equal"),
                    ("one token", "peaked"),
                    ("152k", "unrelated"),
                    ("152k", "nearly equal"),
                    ("odd", "far from 0"),
                ):
                    yield from _few_cases(impl, dtype, shape, model)
            yield from _few_cases(impl, "float64", "odd", "unrelated")

    every = REHEARSED_EVERY if rehearse else 1
    yield from (case for number, case in enumerate(cases()) if number % every == 0)


def _cases(impl: str, dtype: str, shape: str, model: str) -> Iterator[Case]:
    def case(kind: str, settings: Settings) -> Case:
        return Case(shape=shape, model=model, dtype=dtype, impl=impl, kind=kind, settings=tuple(settings.items()))

    for divergence in (*DIVERGENCES, *ENDS):
        for kind in WHOLE:
            yield case(kind, divergence)
        yield case("dense with −inf", divergence)
    for divergence in CLOSED:
        yield case("hybrid", divergence | HYBRID)
    for divergence in PARTIAL:
        for tail in TAILS:
            yield case("top_k", divergence | {"tail": tail})
    for settings in SAMPLED:
        yield case("sampled", settings)
    yield case("none", {"policy": True})


def _few_cases(impl: str, dtype: str, shape: str, model: str) -> Iterator[Case]:
    kinds = {"hidden": (*CLOSED, *ENDS), "top_k": PARTIAL[:2], "sampled": SAMPLED, "logit": DIVERGENCES[:3]}
    for kind, divergences in kinds.items():
        for settings in divergences:
            yield Case(shape=shape, model=model, dtype=dtype, impl=impl, kind=kind, settings=tuple(settings.items()))


@cache
def world(shape: str, model: str, dtype: str, device: str, rehearse: bool) -> Any:
    tokens, hidden, vocab = (SMALL if rehearse else SHAPES)[shape]
    return _World(tokens, hidden, vocab, dtype=DTYPES[dtype], device=device, **MODELS[model])


class _World(World):
    """Remembers its teacher's logits: float64 products of large vocabularies are asked for several times a case."""

    def teacher_logits(self) -> Tensor:
        if "teacher_logits" not in self.parts:
            self.parts["teacher_logits"] = super().teacher_logits()
        return self.parts["teacher_logits"]


def _ruled_out(made: Any, dtype: torch.dtype) -> DenseTarget:
    """Teacher logits in which some tokens cannot occur: a reverse KL is truly infinite there."""
    logits = made.teacher_logits().to(dtype).clone()
    logits[::2, 0] = logits[::3, -1] = -torch.inf
    return DenseTarget(logits=logits)


OBJECTIVES = {
    "reverse KL": Objective(),
    "forward KL, temperatures 1.5": Objective(
        divergence="forward_kl", student_temperature=1.5, teacher_temperature=1.5
    ),
    "JSD, β = 0.2": Objective(divergence="generalized_jsd", beta=0.2),
    "teacher's top 16, bucket": Objective(support="teacher_top_k", top_k=16),
    "teacher's top 16, sampled tail": Objective(support="teacher_top_k", top_k=16, tail="sampled"),
    "student's top 16": Objective(support="student_top_k", top_k=16),
    "union of both top 8": Objective(support="union", top_k=8, always_include=(3,)),
    "k1 as an advantage": Objective(support="sampled", estimator="k1", delivery="advantage"),
    "k1, value baseline, discount": Objective(
        support="sampled", estimator="k1", delivery="advantage", baseline="value", discount=0.9
    ),
    "floor on the teacher": Objective(teacher_logp_floor=-6.0),
}


def trainer_loss(sheet: Sheet, objective: Objective) -> dict[str, Any]:
    """`linear_objective` in float32 on the device against the plain version in float64 on the CPU: sum, gradients, metrics."""
    exact = _objective(
        world("odd", "unrelated", "float32", "cpu", sheet.rehearse), objective, torch.float64, "reference"
    )
    made = world("odd", "unrelated", "float32", str(sheet.device), sheet.rehearse)
    return _compared(_objective(made, objective, torch.float32, "auto"), exact)


def _objective(made: Any, objective: Objective, dtype: torch.dtype, impl: Any) -> dict[str, Tensor]:
    leaves = [part.to(dtype).clone().requires_grad_() for part in (made.hidden_states, made.weight, made.bias)]
    total, per_token, metrics = linear_objective(
        leaves[0],
        leaves[1],
        made.target("hidden", dtype),
        made.response_ids,
        objective,
        token_weights=made.token_weights.to(dtype),
        bias=leaves[2],
        sampler_logp=made.old.to(dtype),
        sequence_index=torch.arange(made.tokens, device=made.device) // 16,
        eos_ids=(1, 2),
        impl=impl,
    )
    total.backward()
    gradients = {
        name: leaf.grad for name, leaf in zip(("dh", "dW", "db"), leaves, strict=True) if leaf.grad is not None
    }
    return {"total": total, "loss": per_token, **metrics, **gradients}


def _compared(got: dict[str, Any], exact: dict[str, Any]) -> dict[str, Any]:
    """The largest difference of each tensor, relative to its own largest entry (1 at least, but for gradients)."""
    if got.keys() != exact.keys():
        raise CheckFailed(f"different outputs: {sorted(got.keys() ^ exact.keys())}")
    errors = {}
    for name, value in exact.items():
        wanted, have = value.detach().double().cpu(), got[name].detach().double().cpu()
        finite = wanted.isfinite()
        if not torch.equal(have[~finite], wanted[~finite]) or not have[finite].isfinite().all():
            raise CheckFailed(f"{name}: other infinities or NaN than in float64")
        size = float(wanted[finite].abs().max()) if finite.any() else 1.0
        size = max(size, 1e-30) if name in ("dh", "dW", "db") else max(size, 1.0)
        errors[name] = float((have - wanted)[finite].abs().max()) / size if finite.any() else 0.0
    worst = max(errors, key=lambda name: errors[name])
    cells = {"outputs": len(errors), "largest relative error": errors[worst], "of": worst}
    bound = ROUNDINGS * torch.finfo(torch.float32).eps
    if errors[worst] > bound:
        raise CheckFailed(f"{worst} is off by {errors[worst]:.1e} of its largest entry, more than {bound:.1e}", cells)
    return cells


def _loss(made: Any, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    target, weights = made.target("hidden", dtype), made.token_weights.float()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_divergence(hidden, weight, target, token_weights=weights).loss

    return loss


def _gradients(loss: Callable[[Tensor, Tensor], Tensor], made: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    hidden, weight = (part.to(dtype).clone().requires_grad_() for part in (made.hidden_states, made.weight))
    value = loss(hidden, weight)
    value.backward()
    assert hidden.grad is not None and weight.grad is not None
    return {"loss": value.detach(), "dh": hidden.grad, "dW": weight.grad}


def _same_inside(sheet: Sheet, wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> dict[str, Any]:
    made = world("odd", "unrelated", "bfloat16", str(sheet.device), sheet.rehearse)
    loss = _loss(made, torch.bfloat16)
    return _compared(_gradients(wrap(loss), made, torch.bfloat16), _gradients(loss, made, torch.bfloat16))


def under_autocast(sheet: Sheet) -> dict[str, Any]:
    """float32 operands stay float32 in autocast's bfloat16 regions: `linear_divergence` decides for itself."""
    made = world("odd", "unrelated", "float32", str(sheet.device), sheet.rehearse)
    loss = _loss(made, torch.float32)

    def inside(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast(sheet.device.type, dtype=torch.bfloat16):
            return loss(hidden, weight)

    return _compared(_gradients(inside, made, torch.float32), _gradients(loss, made, torch.float32))


def compiled(sheet: Sheet) -> dict[str, Any]:
    backend = "eager" if sheet.rehearse else "inductor"
    return _same_inside(sheet, lambda loss: torch.compile(loss, backend=backend))


def checkpointed(sheet: Sheet, *, reentrant: bool) -> dict[str, Any]:
    """The hidden states come out of a recomputed layer, and the loss itself is recomputed."""

    def wrap(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def inside(hidden: Tensor, weight: Tensor) -> Tensor:
            layer = checkpoint(lambda x: x * 1.0, hidden, use_reentrant=reentrant)
            return checkpoint(loss, layer, weight, use_reentrant=reentrant)  # pyright: ignore[reportReturnType]

        return inside

    return _same_inside(sheet, wrap)


def log_probs(sheet: Sheet) -> dict[str, Any]:
    """`linear_log_prob` of bfloat16 operands against log_softmax in float64."""
    made = world("odd", "unrelated", "bfloat16", str(sheet.device), sheet.rehearse)
    slopes = torch.linspace(-1, 1, len(made.response_ids), device=sheet.device)

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        logp, entropy = linear_log_prob(hidden, weight, made.response_ids)
        return (logp * slopes).sum() + entropy.sum()

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        logp = (hidden @ weight.T).log_softmax(-1)
        picked = logp.gather(-1, made.response_ids[:, None]).squeeze(-1)
        return (picked * slopes).sum() - (logp.exp() * logp).sum()

    exact = _gradients(plain, made, torch.float64)
    got, bound = _gradients(ours, made, torch.bfloat16), torch.finfo(torch.bfloat16).eps
    errors = {name: float((got[name].double() - exact[name]).abs().max() / exact[name].abs().max()) for name in exact}
    if max(errors.values()) > bound:
        raise CheckFailed(f"off by more than a rounding of bfloat16, {bound:.1e}", errors)
    return errors


AROUND: dict[str, Callable[[Sheet], dict[str, Any]]] = {
    "autocast, float32 weights": under_autocast,
    "checkpointing, use_reentrant=False": partial(checkpointed, reentrant=False),
    "checkpointing, use_reentrant=True": partial(checkpointed, reentrant=True),
    "linear_log_prob": log_probs,
    "torch.compile": compiled,
}

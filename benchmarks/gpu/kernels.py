"""The loss from hidden states on the device: time, memory and error beside four bare products, the plain loss and other libraries."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.clock import Profile, interleaved, is_product, middle, milliseconds, peak_mib, profile
from benchmarks.gpu.sheet import CheckFailed, Sheet
from benchmarks.kernels.cases import Variant, Workload
from benchmarks.kernels.variants import BETA, Inputs, float64_gradients, make_inputs, make_step
from opd.kernels import PolicyTerm, linear_divergence, linear_log_prob, linear_objective
from opd.losses import Objective
from opd.types import Head, HiddenTarget

WIDE = Workload(
    name="H 4096", tokens=8192, hidden=4096, teacher_hidden=4096, vocab=151_936, chunk=1024, reps=0, rounds=5
)
LOADS = (WIDE, replace(WIDE, name="H 2048", hidden=2048, teacher_hidden=2048))
TINY = Workload(name="tiny", tokens=48, hidden=16, teacher_hidden=16, vocab=515, chunk=16, reps=0, rounds=1)
TOP_K = 64
NOISE = 0.02
"""KL of about 0.005 nats, where distillation ends and where rounded logits cost the most."""
WARM_UPS = 2
ERROR_ROWS = 64
"""Tokens whose float64 gradients are computed."""
LOGIT_BYTES = 3 * 4
"""Bytes a row pass must move per logit: both models' float32 are read, and the gradient is written in place."""
SHOWN_KERNELS = 12
PROFILED = (
    "opd triton, reverse KL",
    "opd triton, JSD",
    "opd triton, top 64 and bucket",
    "opd in the trainer, reverse KL",
    "opd in the trainer, reverse KL, float32 weights, autocast",
    "opd log-prob",
)
SQUARE = 8192
COPIED = 2**30
ERROR_BOUND = 2.0**-6
"""Of dh in bfloat16, as a share of its norm: two roundings of an operand and one of the result are far below it."""
CASE_SECONDS = 6.0

Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One way to compute one loss."""

    name: str
    loss: str
    make: Callable[[Inputs, Workload], Step]
    reference: str = ""
    """The divergence whose float64 gradient its dh must match; empty where there is none."""
    needs: tuple[str, ...] = ()


def measure(sheet: Sheet) -> None:
    ceilings = sheet.case("ceilings of this device", "copy and product", partial(_ceilings, sheet))
    loads = (TINY,) if sheet.rehearse else LOADS
    for load in loads:
        _times(sheet, load, OURS, load.shape, ceilings or {})
    _times(sheet, loads[0], (PRODUCTS, *BESIDE, *PEERS), f"{loads[0].shape}, beside others", {})


def _ceilings(sheet: Sheet) -> dict[str, Any]:
    """Bandwidth of a copy, reads and writes counted, and the rate of a large product of random bfloat16 matrices."""
    count, side = (2**20, 256) if sheet.rehearse else (COPIED // 4, SQUARE)
    source = torch.randn(count, device=sheet.device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=sheet.device).bfloat16() for _ in range(2))
    for _ in range(WARM_UPS):
        target.copy_(source)
        torch.mm(left, right)
    copy = statistics.median(milliseconds(lambda: target.copy_(source), sheet.device) for _ in range(10))
    product = statistics.median(milliseconds(lambda: left @ right, sheet.device) for _ in range(10))
    return {"copy GB/s": 2 * 4 * count / copy / 1e6, f"product of {side}³ TFLOP/s": 2 * side**3 / product / 1e9}


def _times(sheet: Sheet, load: Workload, ways: Sequence[Timed], title: str, ceilings: Any) -> None:
    """Warm every variant up, measure its memory and error, then time all of them in turn; with `ceilings`, profile some."""
    inputs = make_inputs(load, noise=NOISE, device=str(sheet.device), dtype=torch.bfloat16)
    top = replace(load, top_k=min(TOP_K, load.vocab // 8))
    best = make_inputs(top, noise=NOISE, device=str(sheet.device), dtype=torch.bfloat16)
    best = replace(best, student_hidden=inputs.student_hidden, student_weight=inputs.student_weight)
    exact = {divergence: _exact(divergence, inputs) for divergence in NAMES}
    ready: dict[str, Step] = {}
    table = f"{title}, bfloat16"
    for way in ways:
        label = f"{way.name}, {way.loss}" if way.loss else way.name
        own = best if way.loss.startswith("top") else inputs

        def prepare(way: Timed = way, own: Inputs = own, label: str = label) -> dict[str, Any]:
            step = way.make(own, load)
            for _ in range(WARM_UPS):
                own.clear()
                step()
            own.clear()
            cells: dict[str, Any] = {"peak MiB": peak_mib(step, sheet.device)}
            own.clear()
            if way.reference:
                cells["error of dh"] = _error(way, own, load, exact[way.reference])
            ready[label] = step
            return cells

        sheet.case(
            f"{table}: memory beyond the inputs, and error", label, prepare, seconds=CASE_SECONDS, needs=way.needs
        )
    if not ready:
        return
    times: dict[str, list[float]] = {}

    def time_all() -> dict[str, Any]:
        times.update(interleaved(ready, sheet.device, rounds=load.rounds, before=inputs.clear))
        return {"variants": len(ready), "rounds": load.rounds}

    sheet.case(f"{table}: the interleaved run", "all", time_all, seconds=CASE_SECONDS)
    floor = statistics.median(times[PRODUCTS.name]) if PRODUCTS.name in times else None
    for label, taken in times.items():
        cells = {**middle(taken), "× products": statistics.median(taken) / floor if floor else None}
        sheet.write(f"{table}: time of forward and backward", label, cells)
    profiles: dict[str, Profile] = {}
    for label in (name for name in PROFILED if name in ready and ceilings):

        def look(label: str = label) -> dict[str, Any]:
            inputs.clear()
            profiles[label] = profile(ready[label], sheet.device)
            inputs.clear()
            return _kernels(profiles[label], load, ceilings)

        sheet.case(f"{table}: one step under the profiler", label, look)
    for label, seen in profiles.items():
        for name, calls, ms in seen.kernels[:SHOWN_KERNELS]:
            cells = {"kind": "product" if is_product(name) else "rows", "calls": calls, "ms": ms}
            sheet.write(f"{title}: {label}, by kernel", f"`{name[:70]}`", cells)


def _kernels(seen: Profile, load: Workload, ceilings: Any) -> dict[str, Any]:
    """Time by kernel."""
    bandwidth = load.tokens * load.vocab * LOGIT_BYTES / max(seen.rows_ms, 1e-9) / 1e6
    products = sum(ms for name, _, ms in seen.kernels if is_product(name))
    return {
        "products ms": products,
        "everything else ms": seen.rows_ms,
        "GB/s of the rows": bandwidth,
        "of a copy": bandwidth / ceilings["copy GB/s"] if ceilings else None,
        "launches": seen.launches,
        "host waits": seen.waits,
    }


def _first_rows(inputs: Inputs) -> Inputs:
    """The first tokens alone, as leaves of their own."""
    rows = slice(0, ERROR_ROWS)

    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[rows]

    count = len(inputs.token_weights[rows])
    return replace(
        inputs,
        student_hidden=inputs.student_hidden.detach()[rows].clone().requires_grad_(),
        teacher_hidden=cut(inputs.teacher_hidden),
        top_ids=cut(inputs.top_ids),
        top_logp=cut(inputs.top_logp),
        token_weights=torch.full_like(inputs.token_weights[rows], 1.0 / count),
    )


def _exact(divergence: str, inputs: Inputs) -> Tensor:
    """dh of the first tokens in float64."""
    return float64_gradients(divergence, _first_rows(inputs))["hidden"]


def _error(way: Timed, inputs: Inputs, load: Workload, exact: Tensor) -> float:
    """‖dh − exact‖ / ‖exact‖ over the first tokens."""
    few = _first_rows(inputs)
    way.make(few, replace(load, tokens=len(few.token_weights)))()
    assert few.student_hidden.grad is not None
    error = float((few.student_hidden.grad.double() - exact).norm() / exact.norm())
    few.clear()
    if way.name.startswith("opd") and not error < ERROR_BOUND:
        raise CheckFailed(f"dh is off by {error:.2e} of its norm, more than {ERROR_BOUND:.2e}", {"error of dh": error})
    return error


def _products(inputs: Inputs, load: Workload) -> Step:
    """Student logits, teacher logits and two gradients: the logits a chunk at a time in float32, each gradient by one product."""
    hidden, weight = inputs.student_hidden.detach(), inputs.student_weight.detach()
    teacher_hidden, teacher_weight = inputs.teacher_hidden, inputs.teacher_weight
    assert teacher_hidden is not None and teacher_weight is not None
    wide: dict[str, Any] = {"out_dtype": torch.float32} if hidden.is_cuda else {}
    kind = torch.float32 if hidden.is_cuda else hidden.dtype
    gradient = torch.randn(len(hidden), weight.shape[0], device=hidden.device, dtype=hidden.dtype)

    def step() -> None:
        logits, teacher_logits = (
            torch.empty(load.chunk, weight.shape[0], device=hidden.device, dtype=kind) for _ in range(2)
        )
        for start in range(0, len(hidden), load.chunk):
            rows = slice(start, start + load.chunk)
            torch.mm(hidden[rows], weight.T, out=logits, **wide)
            torch.mm(teacher_hidden[rows], teacher_weight.T, out=teacher_logits, **wide)
        torch.mm(gradient, weight, **wide)
        torch.mm(gradient.T, hidden)

    return step


def _known(name: str, divergence: str) -> Callable[[Inputs, Workload], Step]:
    """A variant of the CPU's benchmark."""
    return lambda inputs, load: make_step(inputs, Variant(name=name, divergence=divergence), load)


def _teacher(inputs: Inputs) -> HiddenTarget:
    assert inputs.teacher_hidden is not None and inputs.teacher_weight is not None
    return HiddenTarget(hidden=inputs.teacher_hidden, head=Head(weight=inputs.teacher_weight))


def _response_ids(inputs: Inputs) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(inputs.student_weight.shape[0], (len(inputs.token_weights),), generator=generator)
    return ids.to(inputs.token_weights.device)


def _hybrid(inputs: Inputs, load: Workload) -> Step:
    """Reverse KL, a clipped policy gradient and an entropy bonus in one pass."""
    ids = _response_ids(inputs)
    with torch.no_grad():
        old = linear_log_prob(inputs.student_hidden, inputs.student_weight, ids)[0] + 0.05
    policy = PolicyTerm(advantages=torch.ones_like(old), old_log_prob=old, clip_range=0.2)

    def step() -> Tensor:
        out = linear_divergence(
            inputs.student_hidden,
            inputs.student_weight,
            _teacher(inputs),
            token_weights=inputs.token_weights,
            response_ids=ids,
            policy=policy,
            entropy_bonus=0.01,
        )
        out.loss.backward()
        return out.loss.detach()

    return step


def _log_prob(inputs: Inputs, load: Workload) -> Step:
    ids = _response_ids(inputs)

    def step() -> Tensor:
        logp, entropy = linear_log_prob(inputs.student_hidden, inputs.student_weight, ids)
        loss = ((0.01 * entropy - logp) * inputs.token_weights).sum()
        loss.backward()
        return loss.detach()

    return step


def _trainer(objective: Objective, *, float32: bool = False) -> Callable[[Inputs, Workload], Step]:
    """The function that the trainer calls, with all its metrics; `float32` has float32 weights under bfloat16 autocast."""

    def make(inputs: Inputs, load: Workload) -> Step:
        ids, target = _response_ids(inputs), _teacher(inputs)
        hidden, weight = inputs.student_hidden, inputs.student_weight
        if float32:
            hidden, weight = (x.detach().float().requires_grad_() for x in (hidden, weight))

        def step() -> Tensor:
            hidden.grad = weight.grad = None
            with torch.autocast(hidden.device.type, dtype=torch.bfloat16, enabled=float32):
                total, _, _ = linear_objective(
                    hidden, weight, target, ids, objective, token_weights=inputs.token_weights, eos_ids=(1,)
                )
            total.backward()
            return total.detach()

        return step

    return make


PRODUCTS = Timed(name="four products", loss="", make=_products)
NAMES = {"reverse_kl": "reverse KL", "forward_kl": "forward KL", "generalized_jsd": "JSD"}
TRITON = tuple(
    Timed(name="opd triton", loss=NAMES[d], make=_known("ours triton", d), reference=d, needs=("triton",))
    for d in NAMES
)
BESIDE = (TRITON[0], TRITON[2])
OURS = (
    PRODUCTS,
    *TRITON,
    Timed(name="opd triton", loss="top 64 and bucket", make=_known("ours triton", "forward_kl"), needs=("triton",)),
    Timed(name="opd", loss="reverse KL, GRPO and entropy", make=_hybrid),
    Timed(name="opd in the trainer", loss="reverse KL", make=_trainer(Objective()), reference="reverse_kl"),
    Timed(
        name="opd in the trainer",
        loss="JSD",
        make=_trainer(Objective(divergence="generalized_jsd", beta=BETA)),
    ),
    Timed(
        name="opd in the trainer",
        loss="reverse KL, float32 weights, autocast",
        make=_trainer(Objective(), float32=True),
    ),
    Timed(name="opd log-prob", loss="", make=_log_prob),
    Timed(name="opd chunked", loss="reverse KL", make=_known("ours", "reverse_kl"), reference="reverse_kl"),
    Timed(name="opd minimal", loss="reverse KL", make=_known("ours minimal", "reverse_kl"), reference="reverse_kl"),
)
PEERS = (
    Timed(name="plain", loss="reverse KL", make=_known("naive", "reverse_kl"), reference="reverse_kl"),
    *(
        Timed(name=name, loss=NAMES[d], make=_known(peer, d), reference=d, needs=needs)
        for name, peer, needs in (
            ("TRL chunked", "TRL chunked", ("trl", "datasets", "accelerate")),
            ("Liger", "Liger eager", ("liger_kernel",)),
            ("Liger, compiled", "Liger compiled", ("liger_kernel",)),
        )
        for d in ("reverse_kl", "generalized_jsd")
    ),
)

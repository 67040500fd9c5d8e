"""`python -m benchmarks kernels --device cuda`: the loss from hidden states in bfloat16 on one GPU, in this environment.

Times are CUDA events around forward and backward, memory is PyTorch's own peak beyond the inputs. TRL's chunked loss takes part where
TRL is installed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from benchmarks._kernels_cases import DIVERGENCES, MIB, Variant, Workload
from benchmarks._kernels_report import SHORT, markdown_table
from benchmarks._kernels_variants import Inputs, float64_gradients, make_inputs, make_step

LOAD = Workload(name="GPU", tokens=8192, hidden=4096, teacher_hidden=4096, vocab=151_936, chunk=1024, reps=10, rounds=1)
NOISE = 0.02  # KL of about 0.005 nats, where distillation ends and rounded logits cost the most
WARM_UPS = 3
ERROR_ROWS = 64  # of which float64 gradients are computed
PRODUCT_NAMES = ("gemm", "nvjet", "cutlass", "xmma", "splitk", "cublas")
LOGIT_BYTES = 3 * 4  # what a row pass must move per logit: read both models' float32, write the gradient in place


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds and MiB of one step."""

    fastest: float
    median: float
    peak: float


def main(results: Path) -> int:
    """Measure, print, and write kernels-cuda.md."""
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a CUDA GPU, and torch sees none here. Leave it out to measure the CPU.")
    inputs = make_inputs(LOAD, noise=NOISE, device="cuda", dtype=torch.bfloat16)
    products = timed(lambda: bare_products(inputs, LOAD.chunk), inputs)
    copied = copy_bandwidth()
    cells = ["4 products", "", f"{products.fastest:.1f}", f"{products.median:.1f}", "1.00", f"{products.peak:.0f}"]
    lines, nats = [[*cells, "", "", ""]], {}
    for divergence in DIVERGENCES:
        reference = float64_gradients(divergence, rows_of(inputs))
        nats[SHORT[divergence]] = reference["loss"].item()
        for variant in variants_on_gpu(divergence):
            step = make_step(inputs, variant, LOAD)
            found = timed(step, inputs)
            cells = [variant.name, SHORT[divergence], f"{found.fastest:.1f}", f"{found.median:.1f}"]
            cells += [f"{found.fastest / products.fastest:.2f}", f"{found.peak:.0f}"]
            error, bandwidth = hidden_error(inputs, variant, reference), row_bandwidth(step, inputs)
            lines.append([*cells, f"{error:.1e}", f"{bandwidth:.0f}", f"{bandwidth / copied:.2f}"])
            print(" ".join(lines[-1]), flush=True)
    header = ["variant", "loss", "ms", "median ms", "× products", "peak MiB", "error of dh", "rows GB/s", "of a copy"]
    text = "\n".join([*introduction(copied, nats), "", *markdown_table(header, lines), "", *NOTES]) + "\n"
    print(text)
    results.mkdir(parents=True, exist_ok=True)
    (results / "kernels-cuda.md").write_text(text)
    return 0


def variants_on_gpu(divergence: str) -> list[Variant]:
    names = ["ours", "ours triton"] + (["TRL chunked"] if find_spec("trl") else [])
    return [Variant(name=name, divergence=divergence) for name in names]


def bare_products(inputs: Inputs, chunk: int) -> None:
    """Student logits, teacher logits and two gradients; logits and the head's gradient in float32, operands in bfloat16."""
    hidden, weight = inputs.student_hidden.detach(), inputs.student_weight.detach()
    teacher_hidden, teacher_weight = inputs.teacher_hidden, inputs.teacher_weight
    assert teacher_hidden is not None and teacher_weight is not None
    shape = (chunk, weight.shape[0])
    logits, teacher_logits = (torch.empty(shape, device=hidden.device) for _ in range(2))
    gradient = torch.ones(shape, device=hidden.device, dtype=hidden.dtype)
    weight_grad, hidden_grad = torch.zeros(weight.shape, device=hidden.device), torch.empty_like(hidden)
    wide = {"out_dtype": torch.float32}
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        torch.mm(hidden[rows], weight.T, out=logits, **wide)
        torch.mm(teacher_hidden[rows], teacher_weight.T, out=teacher_logits, **wide)
        torch.mm(gradient, weight, out=hidden_grad[rows])
        torch.addmm(weight_grad, gradient.T, hidden[rows], out=weight_grad, **wide)  # pyright: ignore[reportCallIssue,reportArgumentType]


def timed(step: Callable[[], object], inputs: Inputs) -> Timing:
    """Events around every repetition; the peak is of the last warm-up."""
    before = peak = 0
    for _ in range(WARM_UPS):
        inputs.clear()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    times = []
    for _ in range(LOAD.reps):
        inputs.clear()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    inputs.clear()
    return Timing(fastest=min(times), median=statistics.median(times), peak=(peak - before) / MIB)


def rows_of(inputs: Inputs) -> Inputs:
    """The first tokens alone, as leaves of their own."""
    assert inputs.teacher_hidden is not None
    rows = slice(0, ERROR_ROWS)
    return replace(
        inputs,
        student_hidden=inputs.student_hidden.detach()[rows].clone().requires_grad_(),
        teacher_hidden=inputs.teacher_hidden[rows],
        token_weights=torch.full_like(inputs.token_weights[rows], 1.0 / ERROR_ROWS),
    )


def hidden_error(inputs: Inputs, variant: Variant, reference: dict[str, Tensor]) -> float:
    """‖dh − reference‖ / ‖reference‖ over a few tokens."""
    few = rows_of(inputs)
    make_step(few, variant, replace(LOAD, tokens=ERROR_ROWS))()
    assert few.student_hidden.grad is not None
    error = (few.student_hidden.grad.double() - reference["hidden"]).norm() / reference["hidden"].norm()
    inputs.clear()
    return error.item()


def row_bandwidth(step: Callable[[], object], inputs: Inputs) -> float:
    """GB/s at which everything but the products moves the logits once in and once out."""
    from torch.profiler import ProfilerActivity, profile

    inputs.clear()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.device_time_total]
    rows = [e for e in events if not any(name in e.key.lower() for name in PRODUCT_NAMES)]
    microseconds = sum(event.self_device_time_total for event in rows)
    return LOAD.tokens * LOAD.vocab * LOGIT_BYTES / max(microseconds, 1e-9) / 1e3


def copy_bandwidth() -> float:
    """GB/s of a device-to-device copy of one chunk of logits, reads and writes counted."""
    source = torch.empty(LOAD.chunk, LOAD.vocab, device="cuda")
    target = torch.empty_like(source)
    nothing = Inputs(student_hidden=source, student_weight=source, token_weights=source)
    found = timed(lambda: target.copy_(source), nothing)
    return 2 * source.numel() * source.element_size() / found.fastest / 1e6


def introduction(copied: float, nats: dict[str, float]) -> list[str]:
    return [
        "# The loss from hidden states, on a GPU",
        "",
        f"`python -m benchmarks kernels --device cuda`, {time.strftime('%Y-%m-%d')}, {torch.cuda.get_device_name()}, "
        f"torch {torch.__version__}, bfloat16 operands, {LOAD.shape}, products in chunks of {LOAD.chunk} tokens, "
        f"device copy {copied:.0f} GB/s. Nats per token: " + ", ".join(f"{k} {v:.4f}" for k, v in nats.items()) + ".",
    ]


NOTES = (
    f"`ms` is the fastest of {LOAD.reps} steps of forward and backward, head's gradient included. Peak is what PyTorch allocates beyond "
    "the inputs.",
    f"Error of dh: norm of the difference from float64 gradients of the same bfloat16 inputs over their norm, on {ERROR_ROWS} tokens.",
    "Rows GB/s: both models' float32 logits read once and the gradient written once, over the time of all kernels that are not "
    "products.",
)

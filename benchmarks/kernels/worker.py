"""One process of the kernel benchmark: `python -m benchmarks.kernels.worker TASK RESULT`.

Peak memory is VmHWM after the first full-sized forward and backward (reset before it through /proc/self/clear_refs) less VmRSS
with the inputs in place. A run at a tiny shape comes first, so that library code and lazy imports are not counted. What
torch.compile needs is not counted either: a variant that compiles runs once in full before.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.cases import MIB, Task, Variant, read_task
from benchmarks.kernels.variants import Inputs, float64_gradients, make_inputs, make_step
from opd.kernels.spec import default_chunk

PACKAGES = {
    "TRL GKD": ("trl", "transformers"),
    "TRL chunked": ("trl", "transformers"),
    "Liger eager": ("liger-kernel",),
    "Liger compiled": ("liger-kernel",),
    "verl top-k": ("verl",),
    "verl top-k chunked": ("verl",),
}


def main(task_path: str, result_path: str) -> None:
    task = read_task(Path(task_path))
    torch.set_num_threads(task.threads)
    inputs = make_inputs(task.workload)
    result = write_references(task, inputs) if task.variant is None else measure(task, task.variant, inputs)
    Path(result_path).write_text(json.dumps(result))


def write_references(task: Task, inputs: Inputs) -> dict[str, Any]:
    """The float64 gradients of every needed divergence, as files; the losses and the default chunk of ours as the answer."""
    losses = {}
    for name in task.needed:
        gradients = float64_gradients(name, inputs)
        torch.save(gradients, _reference_path(task, name))
        losses[name] = gradients["loss"].item()
    return {"losses": losses, "default_chunk": default_chunk(inputs.student_hidden, task.workload.vocab, "fast")}


def measure(task: Task, variant: Variant, inputs: Inputs) -> dict[str, Any]:
    """Memory of the first step, time of this and further ones, and the error of the last one's gradients."""
    warm_up(task, variant)
    step = make_step(inputs, variant, task.workload)
    if variant.compiles:
        step()
        inputs.clear()
    before = start_peak()
    cpu, wall, loss = [], [], None
    peak = 0
    for rep in range(task.workload.reps):
        inputs.clear()
        gc.collect()
        started = time.perf_counter(), time.process_time()
        loss = step()
        wall.append(time.perf_counter() - started[0])
        cpu.append(time.process_time() - started[1])
        if rep == 0:
            peak = status("VmHWM") - before
    return {
        "cpu": cpu,
        "wall": wall,
        "peak_mib": peak / MIB,
        "loss": None if loss is None else loss.item(),
        "errors": errors(task, variant, inputs) if task.check and variant.reference else {},
        "versions": {"torch": torch.__version__} | {name: _version(name) for name in PACKAGES.get(variant.name, ())},
    }


def warm_up(task: Task, variant: Variant) -> None:
    """Load what the products and the variant's code need from disk."""
    a = torch.randn(256, 256, requires_grad=True)
    (a @ a).sum().backward()
    load = task.workload
    tiny = replace(
        load, tokens=16, hidden=8, teacher_hidden=16, vocab=128, chunk=8, top_k=load.top_k and min(load.top_k, 64)
    )
    if not variant.compiles:  # a second shape would make torch.compile turn to dynamic shapes
        inputs = make_inputs(tiny)
        make_step(inputs, replace(variant, chunk=variant.chunk and 8), tiny)()


def start_peak() -> int:
    """Give freed pages back, reset the peak, and return the resident bytes."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def errors(task: Task, variant: Variant, inputs: Inputs) -> dict[str, float]:
    """Largest difference between each gradient and its reference, over the reference's largest entry."""
    reference = torch.load(_reference_path(task, variant.reference), mmap=True)
    found = {}
    for name, leaf in (("hidden", inputs.student_hidden), ("weight", inputs.student_weight)):
        if leaf.grad is None:
            raise SystemExit(f"{variant.name} left no gradient of the {name}.")
        difference = (leaf.grad.double() - reference[name]).abs().max() / reference[name].abs().max()
        found[name] = difference.item()
    return found


def _reference_path(task: Task, name: str) -> Path:
    return Path(task.references) / f"{task.workload.name}-{name}.pt"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


if __name__ == "__main__":
    main(*sys.argv[1:])

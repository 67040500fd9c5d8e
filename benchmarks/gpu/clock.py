"""Times, memory and kernels of a step, on a GPU by its own events and counters, on a CPU by the host's clock."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

MIB = 2**20
PRODUCTS = ("gemm", "nvjet", "cutlass", "xmma", "splitk", "cublas", "aten::mm", "aten::addmm")
"""Names of matrix-product kernels."""
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """One call. The device is idle before it."""
    synchronize(device)
    if device.type != "cuda":
        began = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def interleaved(
    steps: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int, before: Callable[[], object]
) -> dict[str, list[float]]:
    """Milliseconds of every step, `rounds` times round, so that a drift of the clock meets all of them alike."""
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, step in steps.items():
            before()
            times[name].append(milliseconds(step, device))
    return dict(times)


def peak_mib(step: Callable[[], object], device: torch.device) -> float | None:
    """Peak memory of one call beyond the memory in use before it; None on a CPU."""
    if device.type != "cuda":
        step()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def middle(times: list[float]) -> dict[str, float]:
    """Median and fastest, as cells."""
    return {"median ms": statistics.median(times), "fastest ms": min(times)}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Kernels of one step."""

    kernels: tuple[tuple[str, int, float], ...]
    """Name, calls, milliseconds; the longest first. Kernels on a GPU, operators on a CPU."""
    launches: int
    waits: int
    """Number of times the host waited for the device."""

    @property
    def rows_ms(self) -> float:
        """Milliseconds of everything but matrix products."""
        return sum(ms for name, _, ms in self.kernels if not is_product(name))


def is_product(name: str) -> bool:
    return any(word in name.lower() for word in PRODUCTS)


def profile(step: Callable[[], object], device: torch.device) -> Profile:
    """One call under PyTorch's profiler."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    on_gpu = device.type == "cuda"
    synchronize(device)
    with watch(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU], acc_events=True) as seen:
        step()
        synchronize(device)
    events = list(seen.key_averages())
    if on_gpu:
        ran = [(e.key, e.count, e.self_device_time_total / 1e3) for e in events if e.device_type == DeviceType.CUDA]
    else:
        ran = [(e.key, e.count, e.self_cpu_time_total / 1e3) for e in events]
    calls = {event.key: event.count for event in events}
    return Profile(
        kernels=tuple(sorted(ran, key=lambda kernel: -kernel[2])),
        launches=sum(calls.get(name, 0) for name in LAUNCHES) if on_gpu else sum(count for _, count, _ in ran),
        waits=sum(calls.get(name, 0) for name in WAITS),
    )

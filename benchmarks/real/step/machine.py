"""What a process can do at best, and what it needed: matrix rate, read bandwidth, peak memory, dtypes. It runs in either environment."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.loop.clock import StepClock

ROWS, INNER, COLUMNS = 2048, 576, 1536
"""Of the product that is timed: enough rows to reach the machine's rate, and the width of SmolLM2-135M's layers."""
READ_BYTES = 1 << 28  # far more than caches hold
TRIALS = 20


def rates() -> dict[str, float]:
    """Operations per second of a product in float32 and in bfloat16, and bytes per second of a sum over memory: the best of some trials,
    with as many threads as torch has been told."""
    memory = torch.ones(READ_BYTES // 4)
    return {
        "float32_rate": _matrix_rate(torch.float32),
        "bfloat16_rate": _matrix_rate(torch.bfloat16),
        "read_rate": READ_BYTES / _best(memory.sum),
    }


def _matrix_rate(dtype: torch.dtype) -> float:
    left, right = torch.randn(ROWS, INNER).to(dtype), torch.randn(COLUMNS, INNER).to(dtype)
    return 2 * ROWS * INNER * COLUMNS / _best(lambda: left @ right.T)


def _best(call: Callable[[], object]) -> float:
    """Seconds of the fastest call, after one that is not timed."""
    call()
    found = []
    for _ in range(TRIALS):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return min(found)


def peak_bytes() -> int:
    """The most memory that this process has had resident (VmHWM of Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


class ProductTypes:
    """Notes in which dtype a model's layers multiply, by phase."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock
        self.found: dict[str, set[str]] = defaultdict(set)

    def watch(self, model: Any) -> None:
        """From now on, look at the products of the model's first feed-forward layer."""
        layer = next(module for name, module in model.named_modules() if name.endswith("mlp.down_proj"))
        layer.register_forward_hook(self._note)

    def _note(self, _module: object, _inputs: object, output: torch.Tensor) -> None:
        self.found[self.clock.running].add(str(output.dtype).removeprefix("torch."))

    def text(self) -> str:
        """E.g. `rollout=float32 teacher=float32 update=float32`."""
        return " ".join(f"{phase}={'+'.join(sorted(kinds))}" for phase, kinds in sorted(self.found.items()))

"""Memory of this machine's devices. Imports no torch."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

MIB = 1 << 20
QUERY = ("--query-gpu=memory.total", "--format=csv,noheader,nounits")
QUERY_TIMEOUT_S = 5.0
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def device_memory(gpus: Sequence[int] | None = None) -> dict[str, int]:
    """Bytes by device: what the CPU has free, within the limit of a container, and what every NVIDIA GPU has in all. A device whose
    memory cannot be told is left out. `gpus` are taken in place of the GPUs of this machine."""
    sizes = [size * MIB for size in _gpus()] if gpus is None else gpus
    found = {f"cuda:{index}": size for index, size in enumerate(sizes)}
    free = _free()
    return found if free is None else {"cpu": free, **found}


def _free() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # no Linux
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    try:
        limit = CGROUP_LIMIT.read_text().strip()
    except OSError:
        return free
    return min(free or int(limit), int(limit)) if limit.isdigit() else free


def _gpus() -> list[int]:
    """MiB of every GPU that the driver shows; CUDA_VISIBLE_DEVICES is not looked at."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        done = subprocess.run([tool, *QUERY], capture_output=True, text=True, timeout=QUERY_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return []
    words = done.stdout.split() if done.returncode == 0 else []
    return [int(word) for word in words if word.isdigit()]

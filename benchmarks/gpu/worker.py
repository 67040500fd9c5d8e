"""One part in one process: `python -m benchmarks.gpu.worker PART --rows FILE --device D --seconds S`."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.gpu.parts import PACKAGES, PARTS, installed
from benchmarks.gpu.results import Row, append_row


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.worker")
    parser.add_argument("part", choices=["about", *(part.name for part in PARTS)])
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.seconds
    if os.getpgid(0) == os.getpid():  # as the command starts it; by hand, the group is the shell's
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    if args.part == "about":
        append_row(args.rows, about(args.device))
        return 0
    import torch

    from benchmarks.gpu.sheet import Sheet

    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    sheet = Sheet(
        part=args.part,
        rows=args.rows,
        device=device,
        rehearse=args.rehearse,
        deadline=deadline,
        models=args.models,
    )
    import_module(f"benchmarks.gpu.{args.part}").measure(sheet)
    return 0


def _end_with(parent: int) -> None:
    """End this process and all that it started when the command is gone: killed, it cannot end them itself."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def about(device: str) -> Row:
    """The device, versions, and which packages are there."""

    def failed(note: str) -> Row:
        return Row(part="about", table="about", case="about", verdict="FAIL", note=note)

    if not installed("torch"):
        return failed(f"PyTorch is not installed for {sys.executable}; run this with the Python that has it.")
    import torch

    cells = {"device": platform.processor() or platform.machine()}
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            return failed(
                "PyTorch sees no CUDA GPU here. On a machine without one, `python -m benchmarks gpu --device cpu --rehearse` shows that "
                "every part runs."
            )
        found = torch.cuda.get_device_properties(device)
        cells = {
            "device": found.name,
            "memory": f"{found.total_memory / 2**30:.1f} GiB, {found.multi_processor_count} multiprocessors",
            "driver": _driver(),
        }
    elif device.startswith("cpu"):
        cells["device"] = "cpu"
    cells["date"] = time.strftime("%Y-%m-%d %H:%M")
    cells["commit"] = _commit()
    cells["python"] = platform.python_version()
    cells["packages"] = ", ".join(f"{name} {_version(name)}" for name in PACKAGES if installed(name))
    cells["not installed"] = ", ".join(name for name in PACKAGES if not installed(name)) or "nothing"
    return Row(part="about", table="about", case="about", cells=dict(cells))


def _version(package: str) -> str:
    try:
        return version(package.replace("_", "-"))
    except PackageNotFoundError:
        return "?"


def _driver() -> str:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.splitlines()[0].strip()
    except (OSError, subprocess.TimeoutExpired, IndexError):
        return "unknown"


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=20,
            cwd=Path(__file__).parent,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

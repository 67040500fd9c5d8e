"""`python -m benchmarks NAME [arguments]` runs `main` of the benchmark's command.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

FOLDERS = {
    "losses": "losses",
    "loop": "loop",
    "kernels": "kernels",
    "gpu": "gpu",
    "kernel_cost": "kernel_cost",
    "gradient_variance": "variance",
    "verl_native": "verl_native",
    "convergence": "convergence",
    "ahead": "ahead",
    "ranks": "ranks",
    "recording": "recording",
    "memory": "memory",
    "guard": "guard",
    "real": "real",
    "real_step": "real.step",
    "real_compression": "real.compression",
    "real_recovery": "real.recovery",
}
"""The benchmarks' folders by their names on the command line."""


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] not in FOLDERS:
        asked = f"No benchmark is called '{argv[0]}'. " if argv and argv[0] not in ("-h", "--help") else ""
        print(f"{asked}python -m benchmarks {{{','.join(FOLDERS)}}} [--help]", file=sys.stderr)
        return 0 if argv and not asked else 2
    return import_module(f"benchmarks.{FOLDERS[argv[0]]}.command").main(list(argv[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

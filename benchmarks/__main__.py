"""`python -m benchmarks NAME [arguments]` runs `main` of benchmarks/NAME.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

NAMES = ("losses", "loop", "kernels", "gpu", "gradient_variance", "verl_native", "convergence")


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] not in NAMES:
        asked = f"No benchmark is called '{argv[0]}'. " if argv and argv[0] not in ("-h", "--help") else ""
        print(f"{asked}python -m benchmarks {{{','.join(NAMES)}}} [--help]", file=sys.stderr)
        return 0 if argv and not asked else 2
    return import_module(f"benchmarks.{argv[0]}").main(list(argv[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m benchmarks gpu`: everything that can only be known on a GPU, in one command and a few minutes."""

from __future__ import annotations

from benchmarks.gpu.command import main

__all__ = ["main"]

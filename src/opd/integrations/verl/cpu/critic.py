"""The critic's engine settings on a CPU: verl ships them ready-made to the worker, which imports this file to read them."""

# pyright: reportMissingImports=false
from __future__ import annotations

from dataclasses import dataclass

from verl.workers.config import FSDPEngineConfig

import opd.integrations.verl.cpu.register  # noqa: F401  # the worker has no other reason to register the CPU's engines


@dataclass
class CpuEngineConfig(FSDPEngineConfig):
    """verl's, unchanged."""

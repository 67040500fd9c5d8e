"""What both comparisons with TRL share. Imported in TRL's own environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

ON_CPU: Mapping[str, Any] = {
    "weight_decay": 0.0,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
"""Arguments of its trainers: what their defaults would add to the work is off."""


def versions() -> dict[str, str]:
    """Of everything that decides a time or a curve."""
    import transformers
    import trl  # pyright: ignore[reportMissingImports]

    return {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}

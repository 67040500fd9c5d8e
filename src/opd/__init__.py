"""On-policy distillation: a student samples, a teacher says token by token what it would have done, the student moves there."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd.config import Config
    from opd.kernels import linear_divergence, linear_log_prob
    from opd.losses import Objective
    from opd.trainer.run import train
    from opd.types import (
        Batch,
        DenseTarget,
        Head,
        HiddenTarget,
        LossOutput,
        Prompt,
        Rollout,
        SampledTarget,
        Sequences,
        Target,
        TopKTarget,
    )

__version__ = "0.1.0"

_HOMES = {
    "Config": "opd.config",
    "Objective": "opd.losses",
    "linear_divergence": "opd.kernels",
    "linear_log_prob": "opd.kernels",
    "train": "opd.trainer.run",
    "Batch": "opd.types",
    "DenseTarget": "opd.types",
    "Head": "opd.types",
    "HiddenTarget": "opd.types",
    "LossOutput": "opd.types",
    "Prompt": "opd.types",
    "Rollout": "opd.types",
    "SampledTarget": "opd.types",
    "Sequences": "opd.types",
    "Target": "opd.types",
    "TopKTarget": "opd.types",
}
__all__ = [
    "Batch",
    "Config",
    "DenseTarget",
    "Head",
    "HiddenTarget",
    "LossOutput",
    "Objective",
    "Prompt",
    "Rollout",
    "SampledTarget",
    "Sequences",
    "Target",
    "TopKTarget",
    "__version__",
    "linear_divergence",
    "linear_log_prob",
    "train",
]


def __getattr__(name: str) -> Any:
    """Public names are imported on first use: `import opd` is instant and needs no torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

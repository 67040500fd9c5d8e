"""On-policy distillation: a student samples, a teacher says token by token what it would have done, the student moves there."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd.config import (
        CheckpointConfig,
        Config,
        EvalConfig,
        GuardConfig,
        LogConfig,
        LoraConfig,
        MixtureConfig,
        NaturalGradientConfig,
        OptimizerConfig,
        PromptsConfig,
        RewardConfig,
        RlConfig,
        RolloutConfig,
        SaveConfig,
        StudentConfig,
        TeacherConfig,
        TrainConfig,
    )
    from opd.errors import OpdError
    from opd.kernels import linear_divergence, linear_log_prob
    from opd.losses import Objective
    from opd.samplers.base import Sampler
    from opd.teachers.base import Teacher
    from opd.teachers.vocabulary import VocabularyMatch
    from opd.trainer.distiller import Distiller, Run
    from opd.trainer.interrupts import Stop
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

__all__ = [
    "Batch",
    "CheckpointConfig",
    "Config",
    "DenseTarget",
    "Distiller",
    "EvalConfig",
    "GuardConfig",
    "Head",
    "HiddenTarget",
    "LogConfig",
    "LoraConfig",
    "LossOutput",
    "MixtureConfig",
    "NaturalGradientConfig",
    "Objective",
    "OpdError",
    "OptimizerConfig",
    "Prompt",
    "PromptsConfig",
    "RewardConfig",
    "RlConfig",
    "Rollout",
    "RolloutConfig",
    "Run",
    "SampledTarget",
    "Sampler",
    "SaveConfig",
    "Sequences",
    "Stop",
    "StudentConfig",
    "Target",
    "Teacher",
    "TeacherConfig",
    "TopKTarget",
    "TrainConfig",
    "VocabularyMatch",
    "__version__",
    "linear_divergence",
    "linear_log_prob",
    "train",
]

_HOMES = {
    "opd.errors": ("OpdError",),
    "opd.kernels": ("linear_divergence", "linear_log_prob"),
    "opd.losses": ("Objective",),
    "opd.samplers.base": ("Sampler",),
    "opd.teachers.base": ("Teacher",),
    "opd.teachers.vocabulary": ("VocabularyMatch",),
    "opd.trainer.distiller": ("Distiller", "Run"),
    "opd.trainer.interrupts": ("Stop",),
    "opd.trainer.run": ("train",),
    "opd.types": (
        "Batch",
        "DenseTarget",
        "Head",
        "HiddenTarget",
        "LossOutput",
        "Prompt",
        "Rollout",
        "SampledTarget",
        "Sequences",
        "Target",
        "TopKTarget",
    ),
}
"""Public names by the module that they come from; all others are sections of `opd.config`."""
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Public names are imported on first use: `import opd` is instant and needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF.get(name, "opd.config")), name)


def __dir__() -> list[str]:
    """The public names alone."""
    return sorted(__all__)

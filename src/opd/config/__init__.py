"""All sections of a run's configuration: frozen dataclasses with a help text under every field. Starts no model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd.config.guard import GuardConfig
    from opd.config.model import DType, LoadOptionsConfig, LoraConfig, ModelConfig, StudentConfig
    from opd.config.optimizer import NaturalGradientConfig, OptimizerConfig
    from opd.config.prompts import PromptsConfig
    from opd.config.rl import HybridConfig, RewardConfig, RlConfig
    from opd.config.rollout import RolloutConfig
    from opd.config.run import RunSettings
    from opd.config.save import SaveConfig
    from opd.config.teachers import BaseMixtureConfig, MixtureConfig, TeacherConfig
    from opd.config.train import CheckpointConfig, EvalConfig, LogConfig, TrainConfig
    from opd.config.vllm import VllmConfig
    from opd.config.whole import Config

__all__ = [
    "BaseMixtureConfig",
    "CheckpointConfig",
    "Config",
    "DType",
    "EvalConfig",
    "GuardConfig",
    "HybridConfig",
    "LoadOptionsConfig",
    "LogConfig",
    "LoraConfig",
    "MixtureConfig",
    "ModelConfig",
    "NaturalGradientConfig",
    "OptimizerConfig",
    "PromptsConfig",
    "RewardConfig",
    "RlConfig",
    "RolloutConfig",
    "RunSettings",
    "SaveConfig",
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
    "VllmConfig",
]

_HOMES = {
    "opd.config.guard": ("GuardConfig",),
    "opd.config.model": (
        "DType",
        "LoadOptionsConfig",
        "LoraConfig",
        "ModelConfig",
        "StudentConfig",
    ),
    "opd.config.optimizer": (
        "NaturalGradientConfig",
        "OptimizerConfig",
    ),
    "opd.config.prompts": ("PromptsConfig",),
    "opd.config.rl": (
        "HybridConfig",
        "RewardConfig",
        "RlConfig",
    ),
    "opd.config.rollout": ("RolloutConfig",),
    "opd.config.run": ("RunSettings",),
    "opd.config.save": ("SaveConfig",),
    "opd.config.teachers": (
        "BaseMixtureConfig",
        "MixtureConfig",
        "TeacherConfig",
    ),
    "opd.config.train": (
        "CheckpointConfig",
        "EvalConfig",
        "LogConfig",
        "TrainConfig",
    ),
    "opd.config.vllm": ("VllmConfig",),
    "opd.config.whole": ("Config",),
}
"""Names by their module. They are imported on first use, so that the sections that need no torch can be had without it."""
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)

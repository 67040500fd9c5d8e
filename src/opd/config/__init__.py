"""All sections of a run's configuration: frozen dataclasses with a help text under every field. Imports no torch."""

from opd.config.algorithm import BaseMixtureConfig, HybridConfig, MixtureConfig, RewardConfig, RlConfig, RolloutConfig
from opd.config.optimizer import NaturalGradientConfig, OptimizerConfig
from opd.config.run import (
    CheckpointConfig,
    Config,
    DType,
    EvalConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    PromptsConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)

__all__ = [
    "BaseMixtureConfig",
    "CheckpointConfig",
    "Config",
    "DType",
    "EvalConfig",
    "HybridConfig",
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
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
]

"""All sections of a run's configuration: frozen dataclasses with a help text under every field. Starts no model."""

from opd.config.model import DType, LoadOptionsConfig, LoraConfig, ModelConfig, StudentConfig
from opd.config.optimizer import NaturalGradientConfig, OptimizerConfig
from opd.config.prompts import PromptsConfig
from opd.config.rl import HybridConfig, RewardConfig, RlConfig
from opd.config.rollout import RolloutConfig
from opd.config.run import Config
from opd.config.teachers import BaseMixtureConfig, MixtureConfig, TeacherConfig
from opd.config.train import CheckpointConfig, EvalConfig, LogConfig, TrainConfig
from opd.config.vllm import VllmConfig

__all__ = [
    "BaseMixtureConfig",
    "CheckpointConfig",
    "Config",
    "DType",
    "EvalConfig",
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
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
    "VllmConfig",
]

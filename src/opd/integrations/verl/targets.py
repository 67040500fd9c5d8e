"""The config classes that `+opd=default` names in place of verl's: they check on the driver, and carry `opd:` to the engine."""

# pyright: reportMissingImports=false
from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
import transformers
import verl
from verl.utils.fs import copy_to_local
from verl.workers.config import FSDPActorConfig, FSDPEngineConfig

from opd.errors import ConfigError
from opd.integrations.verl.checks import Pool, Run, check_models, check_run, check_version, notes
from opd.integrations.verl.settings import SOLE, Settings, parse


@dataclass
class OpdEngineConfig(FSDPEngineConfig):
    """verl's FSDP settings, and ours beside them. verl makes one in every worker, before it looks for an engine."""

    opd: Any = None
    """The `opd:` section as written."""
    opd_reduction: dict[str, Any] = field(default_factory=dict)
    """loss_agg_mode and loss_scale_factor of the actor."""

    def settings(self) -> Settings:
        return parse(self.opd or {})[0]

    def __post_init__(self) -> None:
        super().__post_init__()
        import opd.integrations.verl.engine  # noqa: F401  # registers the engine; not at the top, because it reads this class


@dataclass
class OpdActorConfig(FSDPActorConfig):
    """verl's actor settings. verl's main calls `validate` on the driver, before Ray starts."""

    opd_run: dict[str, Any] = field(default_factory=dict)
    """What of the rest of the config matters to us."""

    def validate(self, n_gpus: int, train_batch_size: int, model_config: Any = None) -> None:
        super().validate(n_gpus, train_batch_size, model_config)
        check_version(verl.__version__)
        settings, mapped = parse(self.fsdp_config.opd or {})
        facts = dict(self.opd_run)
        run = Run(
            strategy=self.strategy,
            sequence_parallel=self.fsdp_config.ulysses_sequence_parallel_size,
            loss_mode=self.policy_loss.get("loss_mode", "vanilla"),
            entropy_coeff=self.entropy_coeff,
            use_kl_loss=self.use_kl_loss,
            sum_pi_squared=self.calculate_sum_pi_squared,
            native_distillation=bool(facts["native_distillation"]),
            native_fused_kernels=bool(facts["native_fused_kernels"]),
            pool=_pool(facts.get("pool")),
            temperature=float(facts["temperature"]),
            top_p=float(facts["top_p"]),
            top_k=int(facts["top_k"]),
            loss_agg_mode=self.loss_agg_mode,
            loss_scale_factor=self.loss_scale_factor,
        )
        check_run(settings, run)
        for note in (*mapped, *notes(settings, run)):
            print(f"opd: {note}", flush=True)
        if settings.distils:
            _check_teachers(settings, copy_to_local(facts["student"]), bool(facts["trust_remote_code"]))
        print(start_line(settings), flush=True)


def _pool(facts: Any) -> Pool | None:
    return None if facts is None else Pool(**{**facts, "teachers": tuple(facts["teachers"])})


def _check_teachers(settings: Settings, student: str, student_code: bool) -> None:
    for name, one in settings.teachers.items():
        if one.adapter_off:
            continue
        match = check_models(
            student,
            copy_to_local(one.model_path),
            student_code=student_code,
            teacher_code=one.trust_remote_code,
            teacher_key="opd.teacher.model_path" if name == SOLE else f"opd.teachers.{name}.model_path",
        )
        if settings.placement == "pool" and settings.objective.top_k > match.size:
            raise ConfigError(
                f"opd.top_k={settings.objective.top_k} is more than the {match.size} tokens of the vocabulary; lower it."
            )
        for warning in match.warnings:
            print(f"opd: warning: {warning}", flush=True)


def start_line(settings: Settings) -> str:
    """That the plugin is in, with versions and the resolved objective: verl hides a plugin that failed to load."""
    versions = f"verl {verl.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"opd {version('opd')} ({versions}): {settings.describe()}"

"""The config classes that `+opd=default` names in place of verl's: they check on the driver, and carry `opd:` to the engine."""

# pyright: reportMissingImports=false
from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
import transformers
import verl
from verl.utils.device import get_device_name
from verl.workers.config import FSDPActorConfig, FSDPEngineConfig

from opd.errors import ConfigError
from opd.integrations.verl.contract.hook_check import PARTS, check_hooks, installed
from opd.integrations.verl.plugin.checks import Pool, Run, check_run, notes
from opd.integrations.verl.plugin.settings import Settings, parse

FSDP = "dp"
"""verl's name of its FSDP engine among the values of model_engine."""


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
        try:
            import opd.integrations.verl.plugin.engine  # noqa: F401  # registers the engine; not at the top, because it reads this class
        except ImportError:
            anyway = bool((self.opd or {}).get("try_verl"))
            check_hooks(installed(), anyway=anyway)  # says by name what another verl has moved
            raise


@dataclass
class OpdActorConfig(FSDPActorConfig):
    """verl's actor settings. verl's main calls `validate` on the driver, before Ray starts."""

    opd_run: dict[str, Any] = field(default_factory=dict)
    """What of the rest of the config matters to us."""

    def validate(self, n_gpus: int, train_batch_size: int, model_config: Any = None) -> None:
        super().validate(n_gpus, train_batch_size, model_config)
        settings, mapped = parse(self.fsdp_config.opd or {})
        check_verl(settings)
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
            from opd.integrations.verl.plugin.driver import check_models

            check_models(settings, model_config, self.fsdp_config)
        print(start_line(settings), flush=True)


def actor_config(**section: Any) -> OpdActorConfig | OtherEngine:
    """What Hydra calls for the actor's section: under another engine that has keys which FSDP's class does not know."""
    engine = section["opd_run"]["model_engine"]
    return OpdActorConfig(**section) if engine == FSDP else OtherEngine(engine=engine)


@dataclass(frozen=True, kw_only=True)
class OtherEngine:
    """An actor that opd has no place in; `validate` says so where verl's main asks it."""

    engine: str

    def validate(self, *_: Any, **__: Any) -> None:
        """Raise ConfigError."""
        raise ConfigError(
            f"model_engine={self.engine}: opd takes hidden states inside FSDP's forward pass, where the output layer is whole, and this "
            f"engine gives it none; set model_engine={FSDP} (verl's FSDP), without --config-name of another engine."
        )


def check_verl(settings: Settings) -> None:
    """Raise ConfigError for a verl that has moved what this run holds on to; say so of one that was never tested."""
    parts = [
        *PARTS,
        *(("serving", "pool") if settings.served else ()),
        *(("cpu",) if get_device_name() == "cpu" else ()),
    ]
    note = check_hooks(installed(), parts, anyway=settings.try_verl)
    if note:
        print(f"opd: {note}", flush=True)


def _pool(facts: Any) -> Pool | None:
    return None if facts is None else Pool(**{**facts, "teachers": tuple(facts["teachers"])})


def start_line(settings: Settings) -> str:
    """That the plugin is in, with versions and the resolved objective: verl hides a plugin that failed to load."""
    versions = f"verl {verl.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"opd {version('opd')} ({versions}): {settings.describe()}"

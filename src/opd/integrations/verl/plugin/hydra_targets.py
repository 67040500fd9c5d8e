"""The Hydra targets that `+opd=default` names in place of verl's config classes: they check on the driver and register the engine."""

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
from opd.integrations.verl.contract.source_check import PARTS, check_contract, installed
from opd.integrations.verl.plugin.checks import RunFacts, TeacherServers, check_run, remarks
from opd.integrations.verl.plugin.settings import Settings, parse


@dataclass
class OpdEngineConfig(FSDPEngineConfig):
    """The section actor.fsdp_config. verl makes one in every worker, before it looks for an engine."""

    opd: Any = None
    """The `opd:` section as written."""
    opd_reduction: dict[str, Any] = field(default_factory=dict)
    """loss_agg_mode and loss_scale_factor of the actor."""
    opd_sampling: dict[str, Any] = field(default_factory=dict)
    """response_length, top_p and top_k of the rollout."""

    def settings(self) -> Settings:
        return parse(self.opd or {})[0]


def start_line(settings: Settings) -> str:
    """Versions and the resolved objective: the sign that the plugin is in, because verl hides one that failed to load."""
    release: str = verl.__version__  # pyright: ignore[reportAttributeAccessIssue]
    versions = f"verl {release}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"opd {version('opd')} ({versions}): {settings.describe()}"


FSDP = "dp"
"""verl's name of its FSDP engine among the values of model_engine."""
SHARED = ("strategy", "entropy_coeff", "use_kl_loss", "loss_agg_mode", "loss_scale_factor")
"""Names that the checks take over from verl's actor."""


def engine_config(**section: Any) -> OpdEngineConfig:
    """The section actor.fsdp_config. Importing the engine registers it with verl."""
    try:
        import opd.integrations.verl.plugin.engine  # noqa: F401
    except ImportError:
        anyway = bool((section.get("opd") or {}).get("try_verl"))
        check_contract(installed(), anyway=anyway)  # names what another verl has moved
        raise
    return OpdEngineConfig(**section)


def actor_config(**section: Any) -> OpdActorConfig | OtherEngine:
    """The section actor. Under another engine than FSDP it has keys that FSDP's class does not know."""
    engine = section["opd_run"]["model_engine"]
    return OpdActorConfig(**section) if engine == FSDP else OtherEngine(engine=engine)


@dataclass
class OpdActorConfig(FSDPActorConfig):
    """verl's actor settings. verl's main calls `validate` on the driver, before Ray starts.

    It raises an OpdError for what this run cannot live with, a verl that has moved what it relies on first of all.
    """

    opd_run: dict[str, Any] = field(default_factory=dict)
    """The values of verl's other sections that the checks read."""

    def validate(self, n_gpus: int, train_batch_size: int, model_config: Any = None) -> None:
        super().validate(n_gpus, train_batch_size, model_config)
        settings, mapped = parse(self.fsdp_config.opd or {})
        parts = [*PARTS, *(("serving", "pool") if settings.is_served else ())]
        parts += ["guard"] if settings.guard.rules else []
        parts += ["cpu"] if get_device_name() == "cpu" else []
        if contract := check_contract(installed(), parts, anyway=settings.try_verl):
            print(f"opd: {contract}", flush=True)
        run = self._run_facts()
        check_run(settings, run)
        for line in (*mapped, *remarks(settings, run)):
            print(f"opd: {line}", flush=True)
        if settings.rl.distilled:
            from opd.integrations.verl.plugin.driver import check_models

            check_models(settings, model_config, self.fsdp_config)
        print(start_line(settings), flush=True)

    def _run_facts(self) -> RunFacts:
        others = {key: value for key, value in self.opd_run.items() if key not in ("model_engine", "pool")}
        servers = self.opd_run.get("pool")
        return RunFacts(
            **others,
            pool=None if servers is None else TeacherServers(**{**servers, "teachers": tuple(servers["teachers"])}),
            **{name: getattr(self, name) for name in SHARED},
            sequence_parallel=self.fsdp_config.ulysses_sequence_parallel_size,
            loss_mode=self.policy_loss.get("loss_mode", "vanilla"),
            sum_pi_squared=self.calculate_sum_pi_squared,
        )


@dataclass(frozen=True, kw_only=True)
class OtherEngine:
    """An actor on an engine that opd does not run in."""

    engine: str

    def validate(self, *_: Any, **__: Any) -> None:
        """Raise ConfigError, where verl's main asks."""
        raise ConfigError(
            f"model_engine={self.engine}: opd takes hidden states inside FSDP's forward pass, where the output layer is whole, and this "
            f"engine gives it none; set model_engine={FSDP} (verl's FSDP), without --config-name of another engine."
        )

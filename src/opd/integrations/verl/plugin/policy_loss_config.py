"""The config of the policy loss `on_policy_distillation`: verl's own actor config, which is checked, or the same keys given in a call."""

# pyright: reportMissingImports=false
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from verl.base_config import BaseConfig
from verl.workers.config import ActorConfig, PolicyLossConfig

from opd.errors import ConfigError, require
from opd.integrations.verl.plugin.concept_names import LOSS_MODE
from opd.integrations.verl.plugin.settings import NAMES, POLICY_LOSS, DistillationSettings, settings_of

OURS = (*NAMES, "opd")
PREFIXES = ("distillation_", "hybrid_", "teacher_")
"""A key that begins so is meant for the distillation; verl's actor has none."""
FILLED = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1, "ppo_micro_batch_size": None}
"""What verl's dataclass insists on, and no policy loss reads."""
SCALARS = (bool, int, float, str, type(None))
STRATEGIES = ("fsdp", "fsdp2")


def read_config(config: Any) -> tuple[DistillationSettings, Any]:
    """What a call's `config` says about distillation, and the config that verl's policy losses can read; None gives the defaults.

    Our keys stand in its `policy_loss` section, or beside `policy_loss: on_policy_distillation`. Raises ConfigError.
    """
    if config is None:
        return DistillationSettings(), None
    if isinstance(config, BaseConfig):
        return settings_of(getattr(config, "policy_loss", None)), config
    given = _mapping(config, "config")
    section = given.get("policy_loss", {})
    if isinstance(section, str):
        if section != LOSS_MODE:
            raise ConfigError(
                f"config.policy_loss={section!r} names another loss; leave it out, or set it to {LOSS_MODE}."
            )
        section = {}
    section = _mapping(section or {}, "config.policy_loss")
    settings = settings_of(_ours(given, section))
    return settings, _actor_config(given, section, settings)


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    if hasattr(value, "__dict__"):
        return vars(value)
    raise ConfigError(
        f"{name} is a {type(value).__name__}; pass verl's actor config, or its keys in a dict, an OmegaConf node or a namespace."
    )


def _ours(given: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    for key in (*given, *section):
        if str(key).startswith(PREFIXES) and key not in OURS:
            raise ConfigError(f"config has {key}, which nothing reads; the keys are {', '.join(OURS)}.")
    found = {}
    for key in OURS:
        values = [place[key] for place in (given, section) if key in place]
        if len(values) == 2 and values[0] != values[1]:
            raise ConfigError(f"config says {key}={values[0]!r}, and its policy_loss {values[1]!r}; drop one.")
        if values:
            found[key] = values[0]
    return found


def _actor_config(given: Mapping[str, Any], section: Mapping[str, Any], settings: DistillationSettings) -> ActorConfig:
    """verl's dataclass with the numbers that policy losses read; verl's defaults for the others."""
    values = _scalars(ActorConfig, given)
    values.pop("policy_loss", None)
    for bound in ("clip_ratio_low", "clip_ratio_high"):  # verl's default is 0.2, whatever clip_ratio is
        values.setdefault(bound, values.get("clip_ratio", ActorConfig.clip_ratio))
    policy_loss = {**_scalars(PolicyLossConfig, section), "loss_mode": settings.hybrid_loss_mode}
    made = ActorConfig(**{**values, **FILLED}, policy_loss=PolicyLossConfig(**policy_loss))
    made.global_batch_info.update(given.get("global_batch_info") or {})
    if values.get("loss_scale_factor") is not None:
        made.global_batch_info.setdefault("loss_scale_factor", values["loss_scale_factor"])
    return made


def _scalars(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of verl's dataclass that are given, as far as they are numbers, texts and switches of verl's own."""
    names = {field.name for field in dataclasses.fields(kind)} - {*FILLED, *OURS}
    taken = (name for name in names if name in given and not name.startswith("_"))
    return {name: given[name] for name in taken if isinstance(given[name], SCALARS)}


def check_config(actor: Any) -> None:
    """Refuse, as a ConfigError, an actor config that cannot work. verl's ActorConfig calls it, on the driver and in every worker."""
    settings, engine = settings_of(actor.policy_loss), actor.get("fsdp_config", None)
    require(
        actor.strategy in STRATEGIES,
        f"loss_mode={LOSS_MODE} with actor.strategy={actor.strategy}: the hook that hands logits to the loss is in verl's FSDP engine "
        f"only; use one of {', '.join(STRATEGIES)}.",
    )
    unset = f"{POLICY_LOSS}.opd.teacher.model is not set; give the teacher's folder or hub name."
    require(bool(settings.all_teachers), unset)
    require(
        max(actor.get("ulysses_sequence_parallel_size", 1), getattr(engine, "ulysses_sequence_parallel_size", 1)) == 1,
        f"loss_mode={LOSS_MODE} with sequence parallelism: teacher and student logits would be shards of a sequence; set "
        "actor_rollout_ref.actor.ulysses_sequence_parallel_size=1.",
    )
    padded = f"loss_mode={LOSS_MODE} with fsdp_config.pad_to_length: switch pad_to_length off."
    require(not getattr(engine, "pad_to_length", False), padded)
    require(
        not actor.get("use_fused_kernels", False),
        f"loss_mode={LOSS_MODE} needs logits, and fused kernels make none; set actor_rollout_ref.model.use_fused_kernels=False.",
    )
    require(
        settings.trains_rl or not (actor.entropy_coeff or actor.use_kl_loss),
        "entropy_coeff and use_kl_loss belong to the policy loss, which opd.rl.weight=0 (hybrid_lambda_rl) leaves out; set "
        f"{POLICY_LOSS}.opd.rl.weight above 0, or entropy_coeff=0 use_kl_loss=False.",
    )

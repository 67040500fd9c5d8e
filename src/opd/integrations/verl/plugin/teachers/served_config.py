"""verl's `distillation:` section under `+opd=pool` and `+opd=hidden`: its servers are asked for what opd's objective reads."""

# pyright: reportMissingImports=false
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl.trainer.distillation.losses import DistillationLossSettings
from verl.workers.config import DistillationLossConfig, DistillationTeacherModelConfig
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

from opd.integrations.verl.plugin.settings import parse

LIMITED = ("vllm", "sglang")
"""Servers of which verl knows how many log-probs they give."""


@dataclass
class ServedLossConfig(DistillationLossConfig):
    """verl's loss settings, of which only what its servers are asked for matters: that is what opd's objective reads."""

    opd: Any = None
    """The `opd:` section as written."""

    _mutable_fields = DistillationLossConfig._mutable_fields | {
        "loss_settings",
        "topk",
        "use_task_rewards",
        "use_policy_gradient",
    }

    def __post_init__(self) -> None:
        settings = parse(self.opd or {})[0]
        one = settings.placement == "hidden" or settings.objective.support == "sampled"
        self.topk = None if one else settings.objective.top_k
        self.loss_settings = DistillationLossSettings(names=["opd"], use_topk=not one, use_estimator=one)
        # verl leaves log-probs out for a loss that is distillation alone; its own policy loss reads them.
        self.use_task_rewards, self.use_policy_gradient = True, False


@dataclass
class ServedTeacherConfig(DistillationTeacherModelConfig):
    """verl's settings of a teacher; the transformers server of `+opd_device=cpu` is taken too."""

    def _validate_topk_logprobs(self, use_topk: bool, topk: int | None) -> None:
        if self.inference.name in LIMITED:
            super()._validate_topk_logprobs(use_topk, topk)


def _hidden() -> type[RolloutReplica]:
    from opd.integrations.verl.plugin.teachers.hidden_server import HiddenStateReplica

    return HiddenStateReplica


RolloutReplicaRegistry.register("opd_hidden", _hidden)

"""The methods: the source of the samples, opd's loss, and the number of samples per prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from opd.config import RlConfig
from opd.losses import Hybrid, Objective


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to use a batch of rollouts."""

    title: str
    samples: int = 1
    """Rollouts of each prompt, so that prompts × samples is the same for every method."""
    source: Literal["student", "teacher"] = "student"
    """Model that generates the rollouts."""
    objective: Objective | None = field(default_factory=Objective)
    """Of the distillation; None: no teacher is asked."""
    rl: RlConfig | None = None
    """Of the reward; None: no reward is asked."""
    warmup: int = 3
    """Updates in which the learning rate grows; without any, the first Adam steps wreck so small a model."""
    imitates: bool = False
    """Every token of the samples is right: maximum likelihood, which is a policy gradient with advantage 1."""

    @property
    def hybrid(self) -> Hybrid:
        """Loss that the update minimises."""
        rl = self.rl
        if rl is None:
            return Hybrid(
                distill=self.objective or Objective(),
                distill_weight=float(self.objective is not None),
                rl_weight=float(self.imitates),
            )
        return Hybrid(
            distill=self.objective or Objective(),
            distill_weight=rl.distill_weight if self.objective is not None else 0.0,
            rl_weight=rl.weight,
            combine=rl.combine,
            scale=rl.scale,
            clip_range=rl.clip_range,
        )


def _grpo(samples: int, warmup: int = 3, note: str = "") -> Method:
    return Method(
        title=f"GRPO, groups of {samples}{note}",
        samples=samples,
        warmup=warmup,
        objective=None,
        rl=RlConfig(weight=1.0, distill_weight=0.0),
    )


def _sampled(baseline: Literal["none", "value"]) -> Objective:
    return Objective(support="sampled", estimator="k1", delivery="advantage", baseline=baseline)


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "grpo4": _grpo(4),
        "grpo16": _grpo(16),
        "grpo4_warm": _grpo(4, 20, ", warm-up of 20 updates"),
        "rloo4": Method(
            title="RLOO, groups of 4",
            samples=4,
            objective=None,
            rl=RlConfig(weight=1.0, distill_weight=0.0, advantage="rloo", normalize_std=False),
        ),
        "reverse_kl": Method(title="OPD, reverse KL"),
        "forward_kl": Method(title="OPD, forward KL", objective=Objective(divergence="forward_kl")),
        "jsd": Method(title="OPD, normalised JSD", objective=Objective(divergence="generalized_jsd")),
        "top_k": Method(
            title="OPD, teacher's top 2 and a bucket", objective=Objective(support="teacher_top_k", top_k=2)
        ),
        "sampled": Method(title="OPD, sampled token", objective=_sampled("none")),
        "sampled_baseline": Method(title="OPD, sampled token, baseline", objective=_sampled("value")),
        "off_policy_kd": Method(
            title="KD on the teacher's samples", source="teacher", objective=Objective(divergence="forward_kl")
        ),
        "seq_kd": Method(title="SeqKD (SFT on the teacher's samples)", source="teacher", objective=None, imitates=True),
        "hybrid": Method(title="Hybrid: GRPO and reverse KL", samples=4, rl=RlConfig(weight=1.0)),
        "hybrid_match": Method(title="Hybrid, scales matched", samples=4, rl=RlConfig(weight=1.0, scale="match")),
    }
)

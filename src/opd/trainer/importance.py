"""Samples of an inference engine, whose distribution is the student's but for rounding: weights where the loss looks at the sampled
token, and a limit on how far the two may be apart."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from opd.config import Config
from opd.errors import ServerError
from opd.losses import Hybrid
from opd.trainer.policy import Policy
from opd.trainer.scoring import Scored
from opd.types import Batch

GAP = "sampler_student_gap"


@dataclass(frozen=True, kw_only=True)
class EngineCorrection:
    """What an update does about a sampler that is not the trainer's own forward pass."""

    cap: float
    """Weights student / sampler of tokens are cut here (truncated importance sampling, Ionides 2008)."""
    max_gap: float
    plain: bool
    """Samples are drawn from the very distribution that is trained, so that weights are 1 but for the engine's rounding."""

    def corrected(self, student: Policy, scored: Scored) -> Scored:
        """The step's batches with capped weights, and metrics about them. A loss that compares whole distributions at every position
        is left alone: the sampler says only where it is looked at."""
        if not looks_at_sample(scored.objective):
            return scored
        weighed, ratios, gaps = [], [], []
        for batch in scored.batches.unscored:
            sampler_logp = batch.sampler_logp
            if sampler_logp is None:
                weighed.append(batch)
                continue
            student_logp = student.log_prob(batch, scored.objective.distill.student_temperature)
            log_ratio = student_logp - sampler_logp
            counted = batch.token_weights != 0
            ratios.append(log_ratio[counted].exp())
            gaps.append(log_ratio[counted].abs())
            weighed.append(self._weighed(batch, student_logp, log_ratio, scored.objective))
        batches = scored.batches.replaced(weighed)
        return dataclasses.replace(scored, batches=batches, metrics={**scored.metrics, **self._metrics(ratios, gaps)})

    def _weighed(self, batch: Batch, student_logp: torch.Tensor, log_ratio: torch.Tensor, hybrid: Hybrid) -> Batch:
        """The weight goes where it is read: policy gradients and tail=sampled divide by the sampler's probability themselves, so that
        this is raised until the quotient is at most the cap; k2 and k3 do not, so that their tokens are weighed."""
        log_cap = math.log(self.cap)
        if hybrid.distill_weight == 0.0 or hybrid.distill.estimator not in ("k2", "k3"):
            return dataclasses.replace(batch, sampler_logp=student_logp - log_ratio.clamp(max=log_cap))
        weights = batch.token_weights * log_ratio.clamp(max=log_cap).exp()
        # The weight is in the token's already, so that the ratio of a reward's term is 1.
        return dataclasses.replace(batch, token_weights=weights, sampler_logp=student_logp)

    def _metrics(self, ratios: list[torch.Tensor], gaps: list[torch.Tensor]) -> dict[str, float]:
        ratio = torch.cat(ratios).double() if ratios else torch.empty(0)
        if not len(ratio):
            return {}
        capped = ratio.clamp(max=self.cap)
        found = {GAP: float(torch.cat(gaps).mean())} if self.plain else {}
        return found | {
            "importance/mean": float(capped.mean()),
            "importance/max": float(ratio.max()),
            "importance/capped": float((ratio > self.cap).double().mean()),
            "importance/effective_share": float(capped.sum() ** 2 / (len(capped) * capped.square().sum())),
        }

    def check(self, metrics: dict[str, float]) -> None:
        """Raise ServerError where sampler and trainer are too far apart; the update on such samples is not saved."""
        gap = metrics.get(GAP)
        if gap is None or gap <= self.max_gap:  # NaN is neither
            return
        raise ServerError(
            f"Sampler and trainer give the same tokens log-probs that are {gap:.3g} nats apart in the mean, more than "
            f"rollout.vllm.max_gap={self.max_gap:g}: the engine has other weights than the student, or computes in a much lower precision, "
            "or with rollout.ahead=1 an update moves the student that far. The step was not saved. Give vLLM the student's dtype (rollout.vllm.args: [--dtype, float32]), or raise max_gap if the gap is known; "
            "then go on with --resume."
        )


def engine_correction(config: Config) -> EngineCorrection | None:
    """None for samples that this process draws itself, with the weights that it trains."""
    rollout = config.rollout
    if rollout.engine == "hf":
        return None
    plain = rollout.temperature == config.objective.student_temperature and rollout.top_p == 1 and rollout.top_k == 0
    return EngineCorrection(cap=rollout.importance_cap, max_gap=rollout.vllm.max_gap, plain=plain)


def looks_at_sample(hybrid: Hybrid) -> bool:
    """The loss depends on which token was sampled."""
    return hybrid.rl_weight != 0.0 or hybrid.distill.looks_at_sample


def correction_note(config: Config) -> list[str]:
    """What a run with an engine does about importance weights, in a line."""
    if config.rollout.engine == "hf":
        return []
    if config.rl.rewarded or config.objective.looks_at_sample:
        return [
            f"the loss looks at the sampled token, so tokens are weighed by student / sampler, cut at rollout.importance_cap="
            f"{config.rollout.importance_cap:g}; metrics importance/*"
        ]
    return [
        "the loss compares whole distributions at every position, so the samples of rollout.engine=vllm need no importance weights"
    ]

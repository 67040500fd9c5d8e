"""Rules about losses, mixtures and rollouts that several sections share, in the recipe and in verl's section. Each raises ConfigError,
with the recipe's keys."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from opd.errors import ConfigError, require
from opd.losses.settings import ObjectiveSettings
from opd.losses.weights import WEIGHT_SUM_TOLERANCE


def check_weights(key: str, weights: Mapping[str, float]) -> None:
    """Refuse weights that are negative or do not sum to one."""
    total = sum(weights.values())
    ok = all(math.isfinite(w) and w >= 0 for w in weights.values()) and abs(total - 1.0) <= WEIGHT_SUM_TOLERANCE
    shown = ", ".join(f"{name}: {weight:g}" for name, weight in weights.items())
    require(ok, f"{key} must be ≥ 0 and sum to 1, but {{{shown}}} sums to {total:g}; divide them by their sum.")


def check_names(key: str, weights: Mapping[str, float], names: Sequence[str]) -> None:
    """Refuse weights of teachers that are not there, and teachers without one; no weights at all pass."""
    require(
        not weights or sorted(weights) == sorted(names),
        f"{key} names {', '.join(sorted(weights))}, and the teachers are {', '.join(sorted(names))}; give every teacher one weight "
        "(0 is allowed).",
    )


def check_kept_rollouts(objective: ObjectiveSettings, *, rewarded: bool, token_fraction: float) -> None:
    """Refuse what needs rollouts of the student as it is, where they are of the student before training."""
    if objective.looks_at_sample:
        sampled = f"estimator={objective.estimator}" if objective.support == "sampled" else "tail=sampled"
        raise ConfigError(
            f"objective {sampled} has the right gradient only for tokens that the student itself sampled, and with rollout.source=cached the "
            "student before training did. The weights that would make up for it, student over sampler, have no bound once the two are far "
            "apart. Use an exact loss (objective.support=full, or teacher_top_k with tail=bucket), or rollout.source=live."
        )
    require(
        not rewarded,
        "rl.weight > 0 needs responses that the student itself drew, and rollout.source=cached has those of the student before training. "
        "Use rollout.source=live.",
    )
    require(
        token_fraction == 1,
        f"train.token_fraction={token_fraction} keeps the tokens where the student is least sure, and rollout.source=cached knows the student "
        "before training alone. Use token_fraction=1, or rollout.source=live.",
    )


class Sampling(Protocol):
    """Sampling of the responses: a `RolloutConfig`, or verl's settings in its terms (top_k=0 is off)."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def lmbda(self) -> float: ...
    @property
    def off_policy(self) -> str: ...


def check_on_policy(objective: ObjectiveSettings, drawn: Sampling) -> None:
    """Refuse losses of the sampled token where tokens are not drawn from the student, nor reweighted to be."""
    if not objective.looks_at_sample:
        return
    top_p, top_k, lmbda = drawn.top_p, drawn.top_k, drawn.lmbda
    sampled = f"estimator={objective.estimator}" if objective.support == "sampled" else "tail=sampled"
    reweighted = objective.estimator in ("k1", "exact")
    tempered = drawn.temperature != objective.student_temperature
    if objective.discount > 0 and (lmbda < 1 or tempered):
        raise ConfigError(
            f"objective.discount={objective.discount} adds what later tokens earn, and a token's own ratio cannot reweight those to the "
            "student's distribution. Set rollout.lmbda=1 and rollout.temperature to objective.student_temperature, or discount=0."
        )
    if lmbda < 1 and (drawn.off_policy == "dataset" or not reweighted):
        raise ConfigError(
            f"objective {sampled} has the right gradient only for tokens that the student sampled, and rollout.lmbda={lmbda} mixes in "
            f"{drawn.off_policy} responses. Set rollout.lmbda=1, or use objective.support=full."
        )
    if (top_p < 1 or top_k > 0 or tempered) and not reweighted:
        raise ConfigError(
            f"objective {sampled} needs tokens drawn from the very distribution it trains, and rollout.temperature, top_p or top_k "
            "draw from another one. Set rollout.temperature=1, top_p=1, top_k=0, or use estimator=k1 (delivery=advantage), which "
            "reweights."
        )
    if top_p < 1 or top_k > 0:
        raise ConfigError(
            f"objective {sampled} cannot make up for tokens that rollout.top_p={top_p} or top_k={top_k} never draw. "
            "Set top_p=1 and top_k=0, or use objective.support=full."
        )


def check_rewarded_rollouts(objective: ObjectiveSettings, drawn: Sampling) -> None:
    """Refuse rewards of responses that another distribution drew: no token's own ratio makes up for a whole response."""
    wanted = objective.student_temperature
    problems = {
        f"lmbda={drawn.lmbda} takes some responses from elsewhere": drawn.lmbda < 1,
        f"top_p={drawn.top_p} leaves tokens out": drawn.top_p < 1,
        f"top_k={drawn.top_k} leaves tokens out": drawn.top_k > 0,
        f"temperature={drawn.temperature} is not objective.student_temperature={wanted}": drawn.temperature != wanted,
    }
    for what, wrong in problems.items():
        require(
            not wrong,
            f"rl.weight > 0 needs responses that the student itself drew, and rollout.{what}. Set rollout.lmbda=1, top_p=1, top_k=0, "
            "and one temperature for both.",
        )

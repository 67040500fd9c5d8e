"""Held-out evaluation: task reward and reverse KL to the teacher, with intervals."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from opd.data.pack import Layout
from opd.losses import Objective
from opd.ranks import ALONE, Ranks
from opd.reporting.intervals import mean_interval, wilson_interval
from opd.rewards import Scorer
from opd.samplers.base import AdjustableSampler, Sampling, draw
from opd.seeding import derive_seed
from opd.teachers.base import Teacher
from opd.trainer.details import ViewCollector
from opd.trainer.metrics import TokenMetrics
from opd.trainer.policy import Policy
from opd.trainer.scoring import scored_batches
from opd.types import Prompt, Rollout, TargetKind, TokenViews

Interval = tuple[float, float]
DISTANCES = ("reverse_kl", "forward_kl")
"""Distances from the teacher that an evaluation measures, by their names among the metrics."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """`accuracy` is the mean reward per sample; `reverse_kl` and `forward_kl` are means over samples of a sample's mean per token (nats), both
    at the tokens that the evaluated model drew."""

    metrics: dict[str, float]
    intervals: dict[str, Interval]
    rollouts: list[tuple[Rollout, list[float], float]]
    """Each with its per-token reverse KL and its reward."""
    per_prompt: dict[str, list[float]]
    """Metric → the mean over the samples of each prompt, in the order of the prompts."""
    views: Mapping[int, TokenViews] = field(default_factory=dict[int, TokenViews])
    """By `Rollout.id`, what both models said, for the first rollouts."""


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Runs one model over the held-out prompts. The same prompts and seeds serve every step, so that steps are comparable."""

    prompts: Sequence[Prompt]
    samples_per_prompt: int
    scorer: Scorer
    teacher: Teacher | None
    """None, or one without an `exact_kind`: only the reward is reported."""
    mixed: Mapping[str, Teacher] = field(default_factory=dict)
    """Members of a mixture, each of which is compared with too."""
    teacher_logp_floor: float | None
    sampling: Sampling
    extra_temperatures: tuple[float, ...]
    layout: Layout
    tokens_per_microbatch: int
    pad_id: int
    seed: int
    ranks: Ranks = ALONE
    """They divide the prompts; every one has the whole evaluation."""
    watched: int = 0
    """Number of rollouts, the first ones, whose views are kept."""
    measure: str
    """The same in evaluations that may be compared: a hash of the prompts, the reward, and how answers are drawn."""

    def run(self, sampler: AdjustableSampler, model: Policy | None, *, extra: bool) -> Evaluation:
        """Evaluate what `sampler` draws; `model` gives the log-probs that are compared with the teacher's (None: they are not). `extra`
        adds accuracies at the extra temperatures."""
        began = time.perf_counter()
        rollouts, rewards = self._sample(sampler, self.sampling)
        nats: dict[str, list[list[float]]] = {}
        watch = ViewCollector(rollouts[: self.watched])
        metrics: dict[str, float] = {}
        intervals: dict[str, Interval] = {}
        per_prompt = {"accuracy": self._per_prompt(rewards)}
        self._add("accuracy", rewards, rollouts, metrics, intervals)
        if self.teacher is not None and self.teacher.exact_kind is not None and model is not None:
            nats = self._nats(rollouts, model, self.teacher, watch)
            for name, rows in nats.items():
                means = [sum(row) / len(row) for row in rows]
                self._add(name, means, rollouts, metrics, intervals)
                per_prompt[name] = self._per_prompt(means)
            for name, member in self.mixed.items():
                apart = [sum(row) / len(row) for row in self._nats(rollouts, model, member)["reverse_kl"]]
                key = f"teacher/{name}/reverse_kl"
                metrics[key], intervals[key] = _mean_over_prompts(apart, self.samples_per_prompt)
        metrics["response_length"] = sum(len(r.response_ids) for r in rollouts) / len(rollouts)
        metrics["truncated"] = sum(not r.finished for r in rollouts) / len(rollouts)
        for temperature in self.extra_temperatures if extra else ():
            name = accuracy_name(temperature)
            _, rewards_there = self._sample(sampler, replace(self.sampling, temperature=temperature))
            metrics[name], intervals[name] = _reward_interval(rewards_there, self.samples_per_prompt)
            per_prompt[name] = self._per_prompt(rewards_there)
        metrics["time/eval"] = time.perf_counter() - began
        kl = nats.get("reverse_kl", [[] for _ in rollouts])
        drawn = list(zip(rollouts, kl, rewards, strict=True))
        views = watch.of_all(self.ranks)
        return Evaluation(metrics=metrics, intervals=intervals, rollouts=drawn, per_prompt=per_prompt, views=views)

    def _per_prompt(self, values: list[float]) -> list[float]:
        return _means_of_groups(values, self.samples_per_prompt)

    def _add(
        self,
        name: str,
        values: list[float],
        rollouts: list[Rollout],
        metrics: dict[str, float],
        intervals: dict[str, Interval],
    ) -> None:
        """The mean and its interval, over all prompts and, where prompts have teachers of their own, over those of each."""
        interval = _reward_interval if name == "accuracy" else _mean_over_prompts
        metrics[name], intervals[name] = interval(values, self.samples_per_prompt)
        groups = {} if self.teacher is None else self.teacher.groups(rollouts)
        for teacher, members in groups.items():
            if teacher:
                key = f"teacher/{teacher}/{name}"
                metrics[key], intervals[key] = interval([values[i] for i in members], self.samples_per_prompt)

    def _sample(self, sampler: AdjustableSampler, sampling: Sampling) -> tuple[list[Rollout], list[float]]:
        seed = derive_seed(self.seed, 0, f"eval at {sampling.temperature}")
        rollouts = draw(sampler.with_sampling(sampling), self.prompts, self.samples_per_prompt, seed=seed)
        scores = self.scorer.score([(r.prompt, r.text) for r in rollouts], [r.finished for r in rollouts])
        return rollouts, list(scores.values)

    def _nats(
        self, rollouts: list[Rollout], model: Policy, teacher: Teacher, watch: ViewCollector | None = None
    ) -> dict[str, list[list[float]]]:
        """Each of `DISTANCES`, per rollout, per response token."""
        assert teacher.exact_kind is not None
        objective = Objective(teacher_logp_floor=self.teacher_logp_floor)
        mine = self.ranks.share([len(r.prompt_ids) + len(r.response_ids) for r in rollouts])
        metrics = token_metrics(
            [rollouts[i] for i in mine],
            model,
            teacher,
            teacher.exact_kind,
            objective,
            watch,
            layout=self.layout,
            tokens_per_microbatch=self.tokens_per_microbatch,
            pad_id=self.pad_id,
        )
        metrics = metrics.of_all(self.ranks)
        found = {name: metrics_by_rollout(metrics, name, rollouts) for name in DISTANCES}
        return {name: rows for name, rows in found.items() if all(rows)}


@torch.no_grad()
def token_metrics(
    rollouts: Sequence[Rollout],
    model: Policy,
    teacher: Teacher,
    kind: TargetKind,
    objective: Objective,
    watch: ViewCollector | None,
    *,
    layout: Layout,
    tokens_per_microbatch: int,
    pad_id: int,
) -> TokenMetrics:
    """What the loss says of every response token, without a gradient; `watch` takes both models' views."""
    batches = scored_batches(
        rollouts,
        teacher,
        kind,
        layout=layout,
        tokens_per_microbatch=tokens_per_microbatch,
        pad_id=pad_id,
        device=model.device,
    )
    metrics = TokenMetrics()
    for batch in batches:
        model.loss(batch, objective, metrics, watch)
    return metrics


def metrics_by_rollout(metrics: TokenMetrics, name: str, rollouts: Sequence[Rollout]) -> list[list[float]]:
    """One metric per rollout, per response token, in the order of the rollouts; micro-batches have them by length."""
    by_id = {rollout.id: values.tolist() for rollout, values in metrics.per_rollout(name)}
    return [by_id[rollout.id] for rollout in rollouts]


def measure_of(*parts: object) -> str:
    """A short name of what an evaluation measures."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=4).hexdigest()


def accuracy_name(temperature: float) -> str:
    return "accuracy_greedy" if temperature == 0 else f"accuracy_t{temperature:g}"


def _reward_interval(rewards: list[float], samples_per_prompt: int) -> tuple[float, Interval]:
    """Wilson's interval for one pass or fail per prompt; otherwise that of the mean over prompts."""
    if samples_per_prompt == 1 and set(rewards) <= {0.0, 1.0}:
        return sum(rewards) / len(rewards), wilson_interval(int(sum(rewards)), len(rewards))
    return _mean_over_prompts(rewards, samples_per_prompt)


def _mean_over_prompts(values: list[float], samples_per_prompt: int) -> tuple[float, Interval]:
    """Samples of one prompt are not independent: they count as one observation, their mean."""
    means = _means_of_groups(values, samples_per_prompt)
    return sum(means) / len(means), mean_interval(means)


def _means_of_groups(values: list[float], size: int) -> list[float]:
    groups = [values[i : i + size] for i in range(0, len(values), size)]
    return [sum(group) / len(group) for group in groups]

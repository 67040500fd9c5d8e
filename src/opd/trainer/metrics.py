"""Per-token diagnostics of a step, averaged over response tokens, for all samples and for each kind of sample."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from opd.losses import TokenLoss
from opd.ranks import Ranks
from opd.types import Batch, Rollout

POLICY_MEANS = ("policy_loss", "clipped")
"""Of the policy gradient: λ_rl · its loss, and the share of tokens whose ratio is clipped."""
NOTHING = torch.empty(0)
REPETITION_NGRAM = 4  # shorter ones repeat in ordinary text


class TokenMetrics:
    """Means over micro-batches of every metric that the loss returns; of `clamped`, the sum. Nothing here is differentiated."""

    def __init__(self, *, plain_sampling: bool = False) -> None:
        """`plain_sampling`: rollouts were drawn at temperature 1 from everything, so that sampler and student should agree."""
        self._plain_sampling = plain_sampling
        self._rollouts: list[Rollout] = []
        self._values: list[dict[str, torch.Tensor]] = []  # of each rollout: name → float64 on the CPU, per token
        self._clamped = 0.0
        self._partial = False  # some tokens are left out, so that a value's place is not its position in the response

    def add(self, batch: Batch, out: TokenLoss) -> None:
        """Take one micro-batch's per-token numbers."""
        values = {name: value.detach() for name, value in out.metrics.items()}
        if (
            self._plain_sampling
            and batch.sampler_logp is not None
            and "student_logp" in values  # not where no token of the micro-batch is kept
            and all(r.source == "student" for r in batch.rollouts)
        ):
            values["sampler_student_gap"] = (values["student_logp"] - batch.sampler_logp).abs()
        if "clamped" in values:
            self._clamped += float(values.pop("clamped").sum())
        sizes = torch.bincount(batch.sequence_index, minlength=len(batch.rollouts)).tolist()
        self._partial |= batch.kept is not None
        self._rollouts.extend(batch.rollouts)
        columns = [value.double().cpu().split(sizes) for value in values.values()]
        self._values.extend(
            {name: column[i] for name, column in zip(values, columns, strict=True)} for i in range(len(sizes))
        )

    def of_all(self, ranks: Ranks) -> TokenMetrics:
        """Those of the micro-batches of every rank."""
        if ranks.alone:
            return self
        whole = TokenMetrics(plain_sampling=self._plain_sampling)
        # As numpy arrays: a tensor that is a view would take its whole storage along.
        values = [{name: value.numpy() for name, value in one.items()} for one in self._values]
        for rollouts, theirs, clamped, partial in ranks.gather((self._rollouts, values, self._clamped, self._partial)):
            whole._rollouts += rollouts
            whole._values += [{name: torch.from_numpy(value) for name, value in one.items()} for one in theirs]
            whole._clamped += clamped
            whole._partial |= partial
        return whole

    def per_rollout(self, name: str) -> list[tuple[Rollout, torch.Tensor]]:
        """The per-token values of one metric beside their rollouts; empty where the target could not tell, or not for every token."""
        known = [{}] * len(self._rollouts) if self._partial else self._values
        return [(rollout, values.get(name, NOTHING)) for rollout, values in zip(self._rollouts, known, strict=True)]

    def summary(self) -> dict[str, float]:
        """Means over response tokens. With both kinds of sample present, also `on_policy/…` and `off_policy/…`."""
        everything = range(len(self._rollouts))
        on = [i for i in everything if self._rollouts[i].source == "student"]
        off = [i for i in everything if self._rollouts[i].source != "student"]
        metrics = self._means(everything)
        on_means = self._means(on) if off else dict(metrics)
        if on:
            metrics |= _perplexity(on_means)
        metrics |= {} if self._partial else self._by_position()
        if on and off:
            metrics |= {f"on_policy/{name}": value for name, value in on_means.items()}
            metrics |= {f"off_policy/{name}": value for name, value in self._means(off).items()}
        metrics |= self._by_teacher()
        metrics["clamped_tokens"] = self._clamped
        metrics["off_policy_share"] = len(off) / max(1, len(self._rollouts))
        return metrics

    def _means(self, members: Sequence[int]) -> dict[str, float]:
        means = {}
        for name in dict.fromkeys(name for i in members for name in self._values[i]):
            values = torch.cat([self._values[i].get(name, NOTHING) for i in members])
            if len(values):
                means[name] = float(values.mean())
        rollouts = [self._rollouts[i] for i in members]
        count = max(1, len(rollouts))
        means["tokens"] = float(sum(len(r.response_ids) for r in rollouts))
        means["response_length"] = means["tokens"] / count
        means["truncated"] = sum(not r.finished for r in rollouts) / count
        means["repetition"] = sum(repetition(r.response_ids) for r in rollouts) / count
        return means

    def _by_teacher(self) -> dict[str, float]:
        """The same means for the prompts of every teacher, where the prompts name several."""
        names = sorted({r.prompt.teacher for r in self._rollouts if r.prompt.teacher is not None})
        found = {}
        for name in names if len(names) > 1 else ():
            members = [i for i, r in enumerate(self._rollouts) if r.prompt.teacher == name]
            found |= {f"teacher/{name}/{metric}": value for metric, value in self._means(members).items()}
        return found

    def _by_position(self) -> dict[str, float]:
        """Reverse KL by position in the response, in buckets that double: 0, 1, 2–3, 4–7, …"""
        rows = [values.get("reverse_kl", NOTHING) for values in self._values]
        means, start, end = {}, 0, 1
        while any(len(row) > start for row in rows):
            means[f"kl_by_position/{start}"] = float(torch.cat([row[start:end] for row in rows]).mean())
            start, end = end, 2 * end
        return means


def _perplexity(on_policy: dict[str, float]) -> dict[str, float]:
    if "teacher_logp" not in on_policy:
        return {}
    return {"teacher_perplexity": math.exp(min(-on_policy["teacher_logp"], 700.0))}  # exp(700) is float64's ceiling


def repetition(ids: Sequence[int]) -> float:
    """Share of a response's 4-grams that already occurred in it: 0 when all differ."""
    grams = [tuple(ids[i : i + REPETITION_NGRAM]) for i in range(len(ids) - REPETITION_NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0

"""The number that each rule of the section guard compares with its threshold, from the metrics of the steps so far."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, variance

OF_LENGTH = frozenset({"truncated", "repetition", "response_length", "eos_prob"})
"""Metrics that say nothing while the length limit itself grows."""
LOSS_WINDOW = 20  # steps whose median a loss is compared with
FEWEST_LOSSES = 10  # before them, the first steps' own fall would count as noise
MAD_TO_STD = 1.4826  # of a normal distribution
LEAST_SPREAD = 0.1  # of the median: a loss that hardly moves has no spread of its own
REWARD_WINDOW = 10  # steps
REWARD_NOISE = 4.0  # standard errors
OFTEN_CUT = 0.5  # of the first responses: the limit is too low, or the student has yet to learn to end


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a rule compares with its threshold, and the same in words, without a full stop. Facts with one are all that there is to say:
    no number was compared."""

    value: float
    facts: str
    causes: str = ""
    """The entry of CAUSES, where it is not that of the rule."""


@dataclass(frozen=True, kw_only=True)
class RewardWindow:
    """Mean reward of some steps, the variance of that mean, and the mean reverse KL of the same steps."""

    reward: float
    error: float
    kl: float


class History:
    """The metrics of the last step, and what earlier ones were: means of the first steps, last losses, the best reward."""

    def __init__(self, first_steps: int) -> None:
        self.now: Mapping[str, float] = {}
        self.canary: Reading | None = None
        """What was seen of the teachers at the last step; None where nobody looked, or where the run is replayed."""
        self.teacher: Mapping[str, float] = {}
        """The evaluation of the teacher's own answers; empty where it was not evaluated."""
        self.first_steps = first_steps
        self.losses: deque[float] = deque(maxlen=LOSS_WINDOW)
        """Before the last step."""
        self.best: RewardWindow | None = None
        """Of the windows that ended before the last one began."""
        self.start_kl: float | None = None
        """Of the last look: not every step has one."""
        self._first: dict[str, list[float]] = {}
        self._rewards: deque[tuple[float, float]] = deque(maxlen=2 * REWARD_WINDOW)

    def add(self, metrics: Mapping[str, float]) -> None:
        """Take one step's metrics; those that are not finite count as missing."""
        if "loss" in self.now:
            self.losses.append(self.now["loss"])
        self.now = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self.start_kl = self.now.get("start_kl", self.start_kl)
        for name, value in self.now.items():
            seen = self._first.setdefault(name, [])
            if len(seen) < self.first_steps:
                seen.append(value)
        if "reward/mean" in self.now and "reverse_kl" in self.now:
            self._rewards.append((self.now["reward/mean"], self.now["reverse_kl"]))
        if len(self._rewards) == 2 * REWARD_WINDOW:
            before = window(list(self._rewards)[:REWARD_WINDOW])
            self.best = before if self.best is None or before.reward > self.best.reward else self.best

    def first(self, name: str) -> float | None:
        """Mean of the first steps; None until they are over."""
        seen = self._first.get(name, [])
        return fmean(seen) if len(seen) == self.first_steps else None

    @property
    def last_rewards(self) -> RewardWindow:
        """Of the last steps."""
        return window(list(self._rewards)[-REWARD_WINDOW:])


def window(steps: Sequence[tuple[float, float]]) -> RewardWindow:
    """Of (reward, reverse KL) pairs, two or more."""
    rewards = [reward for reward, _ in steps]
    return RewardWindow(
        reward=fmean(rewards), error=variance(rewards) / len(rewards), kl=fmean([kl for _, kl in steps])
    )


def truncated(history: History) -> Reading | None:
    share, first = history.now.get("truncated"), history.first("truncated")
    if share is None:
        return None
    facts = f"{share:.0%} of the responses are cut off"
    if first is None or first >= OFTEN_CUT:
        return Reading(value=share, facts=facts)
    return Reading(value=share, facts=f"{facts}, {_at_first(first, '.0%', history)}", causes="truncated later")


def repetition(history: History) -> Reading | None:
    now, first = history.now.get("repetition"), history.first("repetition")
    if now is None or first is None:
        return None
    facts = f"{now:.0%} of the responses' 4-grams are repetitions, {_at_first(first, '.0%', history)}"
    return Reading(value=now - first, facts=facts)


def length(history: History) -> Reading | None:
    now, first = history.now.get("response_length"), history.first("response_length")
    if not now or not first:
        return None
    learns_to_end = now < first and (history.first("truncated") or 0.0) >= OFTEN_CUT
    value = 1.0 if learns_to_end else max(now / first, first / now)
    facts = f"responses have {now:.4g} tokens, {_at_first(first, '.4g', history)}"
    teacher = history.teacher.get("response_length")
    if not teacher or history.teacher.get("truncated", 0.0) >= OFTEN_CUT:  # a limit is no length
        return Reading(value=value, facts=facts)
    value = min(value, max(now / teacher, teacher / now))
    return Reading(value=value, facts=f"{facts}; the teacher's own have {teacher:.4g}")


def eos_prob(history: History) -> Reading | None:
    now, first = history.now.get("eos_prob"), history.first("eos_prob")
    if now is None or first is None:
        return None
    facts = f"the mean probability of the end is {now:.2g}, {_at_first(first, '.2g', history)}"
    return Reading(value=_factor(first, now), facts=facts)


def entropy(history: History) -> Reading | None:
    now, first = history.now.get("student_entropy"), history.first("student_entropy")
    if now is None or first is None:
        return None
    teacher = history.now.get("teacher_entropy")
    facts = f"the student's entropy is {now:.2g} nats, {_at_first(first, '.2g', history)}"
    if teacher is not None:
        return Reading(value=_factor(min(first, teacher), now), facts=f"{facts}; the teacher's is {teacher:.2g}")
    kl, first_kl = history.now.get("reverse_kl"), history.first("reverse_kl")
    nearer = kl is not None and first_kl is not None and kl < first_kl / 2
    return None if nearer else Reading(value=_factor(first, now), facts=facts)


def loss(history: History) -> Reading | None:
    now = history.now.get("loss")
    if now is None or len(history.losses) < FEWEST_LOSSES:
        return None
    middle = median(history.losses)
    spread = MAD_TO_STD * median(abs(value - middle) for value in history.losses)
    spread = max(spread, LEAST_SPREAD * abs(middle))
    if spread == 0.0:
        return None
    facts = f"the loss is {now:.3g}, and the median of the last {len(history.losses)} steps is {middle:.3g}"
    return Reading(value=(now - middle) / spread, facts=facts)


def reward(history: History) -> Reading | None:
    best = history.best
    if best is None or "reward/mean" not in history.now:
        return None
    last = history.last_rewards
    fall, noise = best.reward - last.reward, REWARD_NOISE * math.sqrt(best.error + last.error)
    if last.kl >= best.kl or fall <= noise or best.reward == 0.0:
        return None
    facts = (
        f"the reward fell from {best.reward:.3g} to {last.reward:.3g} (means of {REWARD_WINDOW} steps) while the reverse KL fell from "
        f"{best.kl:.3g} to {last.kl:.3g}"
    )
    return Reading(value=fall / abs(best.reward), facts=facts)


def clipped(history: History) -> Reading | None:
    now = history.now
    shares = {
        "have a clipped ratio": now.get("clipped", 0.0),
        "have a capped importance weight": now.get("importance/capped", 0.0),
        "have a clamped teacher's log-prob": now.get("clamped_tokens", 0.0) / max(1.0, now.get("tokens", 0.0)),
    }
    what, share = max(shares.items(), key=lambda item: item[1])
    return Reading(value=share, facts=f"{share:.0%} of the tokens {what}")


def sampler_gap(history: History) -> Reading | None:
    gap = history.now.get("sampler_student_gap")
    facts = "sampler and trainer give the same tokens log-probs that are {:.2g} nats apart in the mean"
    return None if gap is None else Reading(value=gap, facts=facts.format(gap))


def canary(history: History) -> Reading | None:
    if history.canary is not None:
        return history.canary
    apart = history.now.get("canary")
    return (
        None
        if apart is None
        else Reading(value=apart, facts="a teacher gives a fixed text other log-probs than before")
    )


def start_kl(history: History) -> Reading | None:
    apart = history.start_kl
    facts = "the student is {:.3g} nats per token from what it was before training"
    return None if apart is None else Reading(value=apart, facts=facts.format(apart))


def _at_first(value: float, form: str, history: History) -> str:
    return f"against {format(value, form)} in the first {history.first_steps} steps"


def _factor(high: float, low: float) -> float:
    """How many times `low` fits into `high`."""
    return high / low if low > 0.0 else math.inf if high > 0.0 else 1.0


READINGS: dict[str, Callable[[History], Reading | None]] = {
    "truncated": truncated,
    "repetition": repetition,
    "length": length,
    "eos_prob": eos_prob,
    "entropy": entropy,
    "loss": loss,
    "reward": reward,
    "clipped": clipped,
    "sampler_gap": sampler_gap,
    "canary": canary,
    "start_kl": start_kl,
}
"""By the name of the rule; None where the metrics cannot say, or not yet."""

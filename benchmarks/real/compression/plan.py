"""Settings of the runs, and which there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from benchmarks.real.store import Row, Store

INT4 = "int4-row"
"""Fake-quantised: 4 bits, symmetric, one scale per row; all weights are trained."""
NF4 = "nf4-lora16"
"""bitsandbytes' 4 bits with adapters of rank 16 beside them, which alone are trained."""
FULL = "full"
STEPS, PROMPTS, TOKENS = 20, 16, 32
SEEDS = (0, 1, 2)
TUNING_SEED = 100


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One run, fully said."""

    weights: str
    """FULL, INT4 or NF4."""
    arm: str
    """A name of ARMS, or untrained."""
    lr: float
    seed: int
    steps: int
    prompts: int
    """Of a step, one response each."""
    tokens: int
    """The longest response."""

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(str(value) for value in asdict(self).values())

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.weights}-{self.arm}-{self.lr}-{self.seed}"

    @property
    def part(self) -> str:
        """The prompts that it is measured on."""
        return "tuning" if self.seed == TUNING_SEED else "held_out"


SETTING = tuple(f.name for f in fields(Setting))
PER_PROMPT = ("reverse_kl", "forward_kl")
"""Results with one number per held-out prompt."""
RESULTS = (
    *PER_PROMPT, "prose_nats", "teacher_text_nats", "training_reverse_kl", "teacher_tokens", "cpu_seconds", "peak_gib",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to recover: what it adds to the common run."""

    title: str
    sections: Mapping[str, Any]


ARMS: Mapping[str, Arm] = {
    "opd": Arm(title="OPD, reverse KL on its own samples", sections={"objective": "reverse_kl", "rollout": {}}),
    "off_policy": Arm(
        title="off-policy KD, forward KL on the teacher's samples",
        sections={"objective": "forward_kl", "rollout": {"lmbda": 0, "off_policy": "teacher"}},
    ),
}
RATES: Mapping[str, Sequence[float]] = {INT4: (3e-5, 1e-4, 3e-4), NF4: (3e-4, 1e-3)}
"""What every arm is tried with on the tuning seed, in rising order."""
FACTOR, MOST_RATES = 3.0, 5
"""A grid whose best rate is its first or last gets another one beyond it, up to so many."""


def untrained(weights: str) -> Setting:
    """The model as it is before training."""
    return Setting(weights=weights, arm="untrained", lr=0.0, seed=0, steps=0, prompts=0, tokens=TOKENS)


def setting(weights: str, arm: str, lr: float, seed: int) -> Setting:
    return Setting(weights=weights, arm=arm, lr=lr, seed=seed, steps=STEPS, prompts=PROMPTS, tokens=TOKENS)


def rates(store: Store, weights: str, arm: str) -> list[float]:
    """The grid of the tuning seed: RATES, and rates beyond as long as the best one is at an edge."""
    tried = list(RATES[weights])
    while len(tried) < MOST_RATES and not store.missing(_tuning(weights, arm, tried)):
        best = _best(store, weights, arm, tried)
        if best == tried[-1]:
            tried.append(_beyond(tried[-1] * FACTOR))
        elif best == tried[0]:
            tried.insert(0, _beyond(tried[0] / FACTOR))
        else:
            break
    return tried


def grid(store: Store, weights: str, arm: str) -> list[Setting]:
    """Every rate on the tuning seed and the tuning prompts."""
    return _tuning(weights, arm, rates(store, weights, arm))


def best_rate(store: Store, weights: str, arm: str) -> float | None:
    """The rate of the grid with the lowest reverse KL; None while the grid has gaps."""
    tried = rates(store, weights, arm)
    return None if store.missing(_tuning(weights, arm, tried)) else _best(store, weights, arm, tried)


def final(store: Store, weights: str, arm: str) -> list[Setting]:
    """The runs of the three seeds with the rate that the grid chose; none while it has gaps."""
    lr = best_rate(store, weights, arm)
    return [] if lr is None else [setting(weights, arm, lr, seed) for seed in SEEDS]


def rounds(store: Store, kinds: Sequence[str]) -> Iterator[list[Setting]]:
    """What is missing, as far as it is known; a grid's extension and the seeds follow from what came before."""
    while True:
        known = [untrained(weights) for weights in (FULL, *kinds)]
        for weights in kinds:
            for arm in ARMS:
                known += [*grid(store, weights, arm), *final(store, weights, arm)]
        missing = store.missing(known)
        if not missing:
            return
        yield missing


def mean(row: Row, name: str) -> float:
    """Of one number per prompt."""
    values = row.series(name)
    return sum(values) / len(values)


def _tuning(weights: str, arm: str, tried: Sequence[float]) -> list[Setting]:
    return [setting(weights, arm, lr, TUNING_SEED) for lr in tried]


def _best(store: Store, weights: str, arm: str, tried: Sequence[float]) -> float:
    return min(_tuning(weights, arm, tried), key=lambda s: mean(store.of([s])[0], "reverse_kl")).lr


def _beyond(lr: float) -> float:
    """One digit, so that 1e-4 · 3 and 3e-4 are the same."""
    return float(f"{lr:.0e}")

"""What is run: arms, rates and seeds, and one setting for each line of recovery.csv."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from benchmarks.real.store import Row, Store
from benchmarks.real.words import Cell

DAMAGE = Cell(name="recovery", words=3, warm_steps=60, warm_rate=2e-4)
"""The narrow task that the chat model is fine-tuned on. At 5e-5, a rate with which the skill comes too, it hardly forgets: after 30 steps a
reverse KL of 0.3 to the original; at 2e-4 it is 2 after 20."""
SEEDS = (0, 1, 2)
TUNING_SEED = 100
STEPS, CHAT, TOKENS = 20, 16, 32
"""Of every arm: updates, chat prompts an update, and the longest answer in tokens."""
SKILL = 8
"""Rows of the skill an update, in the arms that have some."""
WARM_UP = 2
ORIGINAL, DAMAGED = "original", "damaged"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way back, from the damaged model."""

    title: str
    trainer: bool = True
    """By `opd train`; False is a plain supervised loop, which opd has none of."""
    skill: bool = False
    """Some rows of an update are of the skill."""
    rates: Sequence[float]
    recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])


ARMS: Mapping[str, Arm] = {
    "opd": Arm(title="OPD, reverse KL", rates=(3e-5, 1e-4)),
    "two_teachers": Arm(
        title="OPD, two teachers by routing",
        skill=True,
        rates=(3e-5, 1e-4),
        recipe={"mixture": {"balance_tokens": True}},
    ),
    "off_policy": Arm(
        title="distillation on the original's answers, forward KL",
        rates=(3e-5, 1e-4),
        recipe={"objective": {"divergence": "forward_kl"}, "rollout": {"lmbda": 0.0, "off_policy": "teacher"}},
    ),
    "sft": Arm(title="SFT on the original's answers", trainer=False, rates=(3e-5, 1e-4)),
    "mixing": Arm(
        title="SFT on both: the original's answers and the task's", trainer=False, skill=True, rates=(3e-5, 1e-4)
    ),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One model that is made and measured."""

    arm: str
    """A name of ARMS, `original`, or `damaged`."""
    lr: float = 0.0
    seed: int
    steps: int = 0
    chat: int = 0
    """Chat prompts an update."""
    skill_rows: int = 0
    """Rows of the skill an update."""
    tokens: int = TOKENS
    damage_steps: int = DAMAGE.warm_steps
    damage_lr: float = DAMAGE.warm_rate

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(str(value) for value in asdict(self).values())

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.arm}-{self.lr:g}-{self.seed}-{self.steps}"


SETTING = tuple(f.name for f in fields(Setting))
RESULTS = (
    "skill", "reverse_kl", "forward_kl", "forward_kl_on_original", "satisfied", "training_tokens", "training_kl", "cpu_seconds", "peak_gib",
)  # fmt: skip
"""`reverse_kl` to `satisfied` have a number for every held-out prompt. Settings of the tuning seed have no `forward_kl_on_original` and no
`satisfied`."""


def store(path: Any) -> Store:
    """The lines of recovery.csv."""
    return Store(path, SETTING, RESULTS)


def baselines(seeds: Iterable[int]) -> list[Setting]:
    """The original, and the damaged model of every seed."""
    return [Setting(arm=ORIGINAL, seed=0), *(Setting(arm=DAMAGED, seed=seed) for seed in seeds)]


def setting(arm: str, lr: float, seed: int, steps: int = STEPS) -> Setting:
    return Setting(arm=arm, lr=lr, seed=seed, steps=steps, chat=CHAT, skill_rows=SKILL if ARMS[arm].skill else 0)


def grid(arms: Iterable[str] = tuple(ARMS)) -> list[Setting]:
    """Every rate on the tuning seed."""
    return [setting(arm, lr, TUNING_SEED) for arm in arms for lr in ARMS[arm].rates]


def score(row: Row) -> float:
    """Smaller is better: reverse and forward KL on the model's own answers, in nats per token."""
    return mean(row, "reverse_kl") + mean(row, "forward_kl")


def mean(row: Row, name: str) -> float:
    values = row.series(name)
    return sum(values) / len(values)


def chosen(there: Store, arm: str) -> float | None:
    """The best rate; None while the grid of the arm is not whole."""
    rows = there.of(grid([arm]))
    if len(rows) < len(ARMS[arm].rates):
        return None
    return float(min(rows, key=score)["lr"])


def reported(there: Store) -> list[Setting]:
    """Every arm whose grid is whole, at its best rate, seed by seed."""
    rates = {arm: chosen(there, arm) for arm in ARMS}
    return [setting(arm, lr, seed) for seed in SEEDS for arm, lr in rates.items() if lr is not None]

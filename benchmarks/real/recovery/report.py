"""Tables of recovery.csv, with intervals over prompts and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.markdown import table
from benchmarks.real import chat
from benchmarks.real.recovery import plan
from benchmarks.real.recovery.instructions import INSTRUCTIONS
from benchmarks.real.recovery.plan import ARMS, CHAT, DAMAGE, DAMAGED, ORIGINAL, SEEDS, SKILL, STEPS, TOKENS, Setting
from benchmarks.real.store import Row, Store

RESAMPLES = 4000
Values = NDArray[np.float64]
"""[seeds, prompts]"""


@dataclass(frozen=True)
class Interval:
    """A number, with the middle 95 % of its bootstrap."""

    value: float
    low: float
    high: float

    def text(self, digits: int, factor: float = 1.0) -> str:
        rounded = (round(factor * x, digits) + 0.0 for x in (self.value, self.low, self.high))  # 0.0, and no −0.0
        value, low, high = (f"{x:.{digits}f}" for x in rounded)
        return f"{value} ({low} to {high})"


def means(values: Values) -> Values:
    """[RESAMPLES] means over seeds and prompts, both drawn again; the same draws for every matrix of one shape, so that pairs stay pairs."""
    source = np.random.default_rng(0)
    seeds, prompts = values.shape
    by_seed = source.multinomial(seeds, [1 / seeds] * seeds, RESAMPLES) / seeds
    by_prompt = source.multinomial(prompts, [1 / prompts] * prompts, RESAMPLES) / prompts
    return np.einsum("rs,sp,rp->r", by_seed, values, by_prompt, optimize=True)


def interval(values: Values) -> Interval:
    low, high = np.quantile(means(values), [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def ratio(above: Values, below: Values) -> Interval:
    """Mean over mean, of the same seeds and prompts."""
    low, high = np.quantile(means(above) / means(below), [0.025, 0.975])
    return Interval(float(above.mean() / below.mean()), float(low), float(high))


def difference(one: Values, other: Values) -> Interval:
    """Mean of `one` less that of `other`, of the same seeds and prompts."""
    return interval(one - other)


@dataclass(frozen=True)
class Group:
    """One model of every seed."""

    title: str
    rows: tuple[Row, ...]

    def values(self, name: str) -> Values:
        return np.array([row.series(name) for row in self.rows])

    def skill(self) -> Values:
        """A number for every seed, as a matrix of one prompt: the held-out rows are many, and without sampling noise."""
        return np.array([[row.number("skill")] for row in self.rows])


def groups(store: Store) -> dict[str, Group]:
    """By arm: the baselines, and every arm that has as many of the first seeds as any other arm."""
    found: dict[str, Group] = {}
    original = store.of([Setting(arm=ORIGINAL, seed=0)])
    if original:
        found[ORIGINAL] = Group("the original", tuple(original))
    wanted = {DAMAGED: ("the damaged model", [Setting(arm=DAMAGED, seed=seed) for seed in SEEDS])}
    for arm in ARMS:
        lr = plan.chosen(store, arm)
        if lr is not None:
            wanted[arm] = (ARMS[arm].title, [plan.setting(arm, lr, seed) for seed in SEEDS])
    there = {arm: [store.of([one]) for one in settings] for arm, (_, settings) in wanted.items()}
    finished = {arm: [*map(bool, rows), False].index(False) for arm, rows in there.items()}
    seeds = max((count for arm, count in finished.items() if arm in ARMS), default=0)
    for arm, (title, _) in wanted.items():
        if 0 < seeds <= finished[arm]:
            found[arm] = Group(title, tuple(row for (row,) in there[arm][:seeds]))
    return found


def seeds_of(found: dict[str, Group]) -> int:
    """How many the arms have; 0 before there is one."""
    return max((len(group.rows) for arm, group in found.items() if arm in ARMS), default=0)


def page(store: Store) -> str:
    """The whole of recovery.md."""
    found = groups(store)
    parts = [
        "# Recovery\n",
        "`python -m benchmarks real_recovery` writes this page from recovery.csv. SmolLM2-135M-Instruct is fine-tuned to write "
        f"{DAMAGE.words} words in the opposite order, and forgets how to chat. That takes {DAMAGE.warm_steps} supervised updates of 24 rows "
        f"at a rate of {DAMAGE.warm_rate:g}. Every arm begins there and makes {STEPS} updates of {CHAT} chat prompts, with answers of at most "
        f"{TOKENS} tokens. Arms with the skill add {SKILL} of its rows, for half of the weight. Intervals are the middle 95 % of a bootstrap "
        f"over {seeds_of(found)} seeds and all prompts.\n",
        "## What came back\n",
        _main(found),
        f"\nKL to the original on {chat.HELD_OUT} held-out prompts, in nats per token: on the model's own answers, and on the original's, "
        f"each drawn at temperature 1. Constraints: the share of {len(INSTRUCTIONS)} held-out prompts whose greedy answer meets a constraint "
        "that code checks. Skill: the exact probability of the right answer, over 512 held-out rows, with the range of the seeds. Tokens: those "
        "of all answers in training; CPU time is that of training.\n",
        "## What is left of the damage, and of the skill\n",
        _left(found),
        "\nOf the damaged model's KL and skill, in per cent, by pairs of the same seeds and prompts. The goal was at most 10 of the one and at "
        "least 90 of the other.\n",
        "## OPD against the others\n",
        _against(found),
        "\nPairs of the same seeds and prompts. A ratio above 1 says that the other arm left more KL than OPD did.\n",
        "## Constraints by kind\n",
        _kinds(found),
        "\n## Learning rates\n",
        _grid(store),
        "\nOne seed of its own. A cell has reverse KL, forward KL (both on the model's own answers) and skill; bold is the smallest sum of the "
        "two KLs, whose rate the arm has above.",
    ]
    return "\n".join(parts) + "\n"


def headline(found: dict[str, Group]) -> str:
    """The table of docs/recovery.md and a sentence for every arm; nothing before an arm has a seed."""
    damaged, original = found.get(DAMAGED), found.get(ORIGINAL)
    arms = {arm: group for arm, group in found.items() if arm in ARMS}
    if damaged is None or original is None or not arms:
        return ""
    head = ["model", "reverse KL to the original", "forward KL", "constraints met, %", "skill, %", "CPU s"]
    lines = [
        [
            group.title,
            *(interval(group.values(name)).text(3) for name in ("reverse_kl", "forward_kl_on_original")),
            interval(group.values("satisfied")).text(0, 100),
            f"{100 * group.skill().mean():.1f}" if group is original else _range(group),
            _mean(group, "cpu_seconds") if group is not original else "",
        ]
        for group in found.values()
    ]
    kept = {arm: 100 * group.skill() / damaged.skill() for arm, group in arms.items()}
    said = [
        f"{group.title}: {ratio(group.values('reverse_kl'), damaged.values('reverse_kl')).text(1, 100)} % of the damaged model's reverse KL is left, "
        f"and {kept[arm].mean():.0f} % ({kept[arm].min():.0f} to {kept[arm].max():.0f}) of its skill."
        for arm, group in arms.items()
    ]
    return table(head, lines) + "\n\n" + "\n".join(f"- {one}" for one in said) + "\n"


KLS = {
    "reverse_kl": "reverse KL, own answers",
    "forward_kl": "forward KL, own answers",
    "forward_kl_on_original": "forward KL, the original's answers",
}


def _main(found: dict[str, Group]) -> str:
    head = ["model", "rate", *KLS.values(), "constraints met, %", "skill, %", "tokens", "CPU s"]
    lines: list[list[str]] = []
    for arm, group in found.items():
        rate = f"{float(group.rows[0]['lr']):g}" if arm in ARMS else ""
        skill = interval(group.skill())
        lines.append(
            [
                group.title,
                rate,
                *(interval(group.values(name)).text(3) for name in KLS),
                interval(group.values("satisfied")).text(0, 100),
                f"{100 * skill.value:.1f}" if arm == ORIGINAL else _range(group),
                _mean(group, "training_tokens"),
                _mean(group, "cpu_seconds"),
            ]
        )
    return table(head, lines)


def _left(found: dict[str, Group]) -> str:
    head = ["model", *(f"{title}, % left" for title in KLS.values()), "skill kept, %"]
    damaged = found.get(DAMAGED)
    lines: list[list[str]] = []
    for arm, group in found.items():
        if damaged is None or arm not in ARMS:
            continue
        kls = [ratio(group.values(name), damaged.values(name)).text(1, 100) for name in KLS]
        kept = 100 * group.skill() / damaged.skill()
        lines.append([group.title, *kls, f"{kept.mean():.1f} ({kept.min():.1f} to {kept.max():.1f})"])
    return table(head, lines)


def _range(group: Group) -> str:
    """The mean of the seeds, and the least and most of them."""
    values = 100 * group.skill()
    return f"{values.mean():.1f} ({values.min():.1f} to {values.max():.1f})"


def _mean(group: Group, name: str) -> str:
    """Of the seeds; nothing where nothing was counted."""
    values = [row.number(name) for row in group.rows if row[name]]
    return f"{np.mean(values):.0f}" if values else ""


def _against(found: dict[str, Group]) -> str:
    head = ["OPD against", *(f"{title}: other / OPD" for title in KLS.values()), "constraints: OPD − other, points"]
    mine = found.get("opd")
    others = [group for arm, group in found.items() if arm not in ("opd", ORIGINAL)]
    lines = [
        [
            group.title,
            *(ratio(group.values(name), mine.values(name)).text(2) for name in KLS),
            difference(mine.values("satisfied"), group.values("satisfied")).text(0, 100),
        ]
        for group in others
        if mine is not None
    ]
    return table(head, lines)


def _kinds(found: dict[str, Group]) -> str:
    kinds = list(dict.fromkeys(one.kind for one in INSTRUCTIONS))
    lines: list[list[str]] = []
    for group in found.values():
        values = group.values("satisfied").mean(0)
        shares = [
            np.mean([v for v, one in zip(values, INSTRUCTIONS, strict=True) if one.kind == kind]) for kind in kinds
        ]
        lines.append([group.title, *(f"{100 * share:.0f}" for share in shares)])
    return table(["% of", *kinds], lines)


def _grid(store: Store) -> str:
    rates = sorted({lr for arm in ARMS.values() for lr in arm.rates})
    damaged = store.of([Setting(arm=DAMAGED, seed=plan.TUNING_SEED)])
    lines = [["the damaged model", *[_tuned(row) for row in damaged], *[""] * (len(rates) - len(damaged))]]
    for arm in ARMS:
        best = plan.chosen(store, arm)
        cells: list[str] = []
        for lr in rates:
            rows = store.of([plan.setting(arm, lr, plan.TUNING_SEED)]) if lr in ARMS[arm].rates else []
            text = _tuned(rows[0]) if rows else ""
            cells.append(f"**{text}**" if lr == best else text)
        lines.append([ARMS[arm].title, *cells])
    return table(["", *(f"{lr:g}" for lr in rates)], lines)


def _tuned(row: Row) -> str:
    kls: Sequence[str] = [f"{plan.mean(row, name):.3f}" for name in ("reverse_kl", "forward_kl")]
    return f"{kls[0]}, {kls[1]}, {100 * row.number('skill'):.0f} %"

"""Updates, rollouts and CPU seconds to shares of the teacher's gain, with intervals, and the pages that quote them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks import markdown
from benchmarks.convergence.report import OPTIMIZERS, Interval, ratio
from benchmarks.real import plan
from benchmarks.real.curves import updates_to
from benchmarks.real.plan import Kind, level
from benchmarks.real.store import Row


@dataclass(frozen=True)
class Group:
    """One arm: a run for every seed."""

    kind: Kind
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        arm, optimizer, weights = self.kind
        trained = "" if weights == plan.FULL else f", LoRA rank {weights.removeprefix('lora')}"
        return f"{plan.ARMS[arm].title}, {OPTIMIZERS[optimizer]}{trained}"

    @property
    def reinforced(self) -> bool:
        return plan.ARMS[self.kind[0]].reinforced

    def updates(self, share: float) -> dict[int, float]:
        """By seed, of the seeds that got there."""
        found = {row.setting.seed: reached(row, share) for row in self.rows}
        return {seed: updates for seed, updates in found.items() if updates is not None}

    def everywhere(self, share: float) -> bool:
        return len(self.updates(share)) == len(self.rows)

    @property
    def rollouts(self) -> int:
        """Of an update."""
        return plan.rollouts(plan.ARMS[self.kind[0]])

    @property
    def seconds(self) -> float:
        """CPU seconds of an update, with its rollouts and scores; loading is divided over the run's updates."""
        return fmean(row.number("cpu_seconds") / row.setting.steps for row in self.rows)


def reached(row: Row, share: float) -> float | None:
    """Updates until this share of the way from the base to the teacher; None where the run ended before."""
    return updates_to(row.series("rewards"), level(row, share))


def groups(rows: Iterable[Row]) -> list[Group]:
    """Of the reporting seeds, in the order of plan.RATES; an arm with several rates keeps the one that most seeds have."""
    found: dict[Kind, dict[float, list[Row]]] = {}
    for row in rows:
        this = row.setting
        if this.seed in plan.SEEDS:
            found.setdefault((this.arm, this.optimizer, this.weights), {}).setdefault(this.lr, []).append(row)
    chosen = {kind: max(by_rate.values(), key=len) for kind, by_rate in found.items()}
    return [
        Group(kind, tuple(sorted(chosen[kind], key=lambda r: r.setting.seed))) for kind in plan.RATES if kind in chosen
    ]


def best_rl(found: Sequence[Group], share: float, factor: Mapping[Kind, float]) -> Group | None:
    """The arm of reinforcement learning that is there first, of those that get there with every seed."""
    able = [g for g in found if g.reinforced and g.everywhere(share)]
    return min(able, key=lambda g: fmean(g.updates(share).values()) * factor[g.kind], default=None)


def compared(group: Group, found: Sequence[Group], share: float, factor: Mapping[Kind, float]) -> Interval | None:
    """How many times less of something (a factor per update) than the best reinforcement learning; None without both."""
    reference = best_rl(found, share, factor)
    if reference is None or group.reinforced or not group.everywhere(share):
        return None

    def cost(g: Group) -> dict[int, float]:
        return {seed: updates * factor[g.kind] for seed, updates in g.updates(share).items()}

    return ratio(cost(reference), cost(group))


def claim_table(found: Sequence[Group]) -> str:
    """Markdown: updates to each level, and ratios against the best arm of reinforcement learning."""
    updates = {g.kind: 1.0 for g in found}
    drawn, seconds = {g.kind: float(g.rollouts) for g in found}, {g.kind: g.seconds for g in found}
    head = ["arm", "rate", "rollouts", *(f"updates to {share:.0%}" for share in plan.LEVELS), "CPU s an update"]
    head += [f"fewer updates, {share:.0%}" for share in plan.LEVELS] + ["fewer rollouts, 80%", "less CPU, 80%"]
    lines = []
    for g in found:
        cells = [_updates(g, share) for share in plan.LEVELS]
        ratios = [compared(g, found, share, updates) for share in plan.LEVELS]
        ratios += [compared(g, found, 0.8, factor) for factor in (drawn, seconds)]
        shown = ["" if r is None else str(r) for r in ratios]
        lines.append([g.title, f"{g.rows[0].setting.lr:g}", str(g.rollouts), *cells, f"{g.seconds:.1f}", *shown])
    return markdown.table(head, lines)


def _updates(group: Group, share: float) -> str:
    """Mean and range over seeds; how many got there, where not all did."""
    values = list(group.updates(share).values())
    if len(values) < len(group.rows):
        return f"{len(values)} of {len(group.rows)}"
    return f"{fmean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def grid_table(rows: Iterable[Row]) -> str:
    """Markdown: every rate on the tuning seed, with the updates to 80 % of its teacher's gain and the accuracy that the run ended with."""
    lines = []
    for row in rows:
        this = row.setting
        if this.seed == plan.TUNING_SEED:
            at = reached(row, 0.8) if this.teacher else None
            title = Group((this.arm, this.optimizer, this.weights), (row,)).title
            ended = f"{row.number('final_accuracy'):.3f}"
            lines.append([title, f"{this.lr:g}", str(this.steps), "" if at is None else f"{at:.1f}", ended])
    return markdown.table(["arm", "rate", "updates run", "updates to 80%", "accuracy at the end"], lines)

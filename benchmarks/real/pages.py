"""results/real: the tables as Markdown, the figure, and the headline of docs/sooner.md. Parts that have not run are left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks import ROOT, markdown
from benchmarks.real import plan
from benchmarks.real.figure import curves
from benchmarks.real.report import Group, best_rl, claim_table, compared, grid_table, groups, reached
from benchmarks.real.store import Row, Store
from opd.reporting.intervals import mean_interval

SOONER = ROOT / "docs" / "sooner.md"
START = "<!-- written by make evidence-real -->\n"
SHARE = 0.8


def write_pages(folder: Path, store: Store) -> None:
    """From what is there."""
    plain = [row for row in store.rows.values() if not row.setting.measured]
    found = groups(plain)
    parts = [claim(found), supports(store.rows.values()), "## Learning rates\n\n" + grid_table(plain)]
    (folder / "tables.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    if any(not g.reinforced for g in found) and any(g.reinforced for g in found):
        (folder / "curves.svg").write_text(curves(found), encoding="utf-8")
        markdown.put_between(SOONER, START, headline(found))


def claim(found: Sequence[Group]) -> str:
    """The first table with what it is of."""
    if not found:
        return ""
    rows = [row for g in found for row in g.rows]
    base = [row.number("base_accuracy") for row in rows]
    teacher = [row.number("teacher_accuracy") for row in rows if row.setting.teacher == ""]
    return (
        f"## Updates to a share of the teacher's gain\n\n{plan.ROLLOUTS} rollouts a step, {len(plan.SEEDS)} seeds. The base is right with "
        f"probability {min(base):.3f} to {max(base):.3f}, the teacher with {min(teacher):.3f} to {max(teacher):.3f}; making the teacher took "
        f"{plan.GRPO_STEPS} updates of GRPO. Mean (lowest to highest) over seeds; where not every seed got there, how many did. Ratios: the best "
        f"GRPO over this arm, with 95 % intervals over seeds.\n\n{claim_table(found)}"
    )


def headline(found: Sequence[Group]) -> str:
    """The rows that docs/sooner.md quotes."""
    ones = {g.kind: 1.0 for g in found}
    factors = (ones, {g.kind: float(g.rollouts) for g in found}, {g.kind: g.seconds for g in found})
    best = best_rl(found, SHARE, ones)
    if best is None:
        return ""
    head = [
        f"to {SHARE:.0%} of the teacher's gain",
        "rollouts a step",
        "updates",
        "fewer updates than the best GRPO",
        "fewer rollouts",
        "less CPU time",
    ]
    lines = [
        [f"{best.title}: the best one", str(best.rollouts), f"{fmean(best.updates(SHARE).values()):.0f}", "", "", ""]
    ]
    for group in found:
        ratios = [compared(group, found, SHARE, factor) for factor in factors]
        if not group.reinforced and None not in ratios:
            updates = f"{fmean(group.updates(SHARE).values()):.1f}"
            lines.append([group.title, str(group.rollouts), updates, *map(str, ratios)])
    return markdown.table(head, lines) + "\n"


def supports(rows: Iterable[Row]) -> str:
    """Divergences and supports at equal teacher tokens."""
    measured = [row for row in rows if row.setting.measured]
    by_arm = {arm: [row for row in measured if row.setting.arm == arm] for arm in plan.SUPPORTS}
    by_arm = {arm: found for arm, found in by_arm.items() if found}
    if not by_arm:
        return ""
    head = [
        "arm",
        "seeds",
        "share of the gain at the end",
        "updates to 80%",
        "reverse KL",
        "forward KL",
        "entropy",
        "length",
    ]
    lines = []
    for arm, found in by_arm.items():
        gains = [
            (r.number("final_accuracy") - r.number("base_accuracy"))
            / (r.number("teacher_accuracy") - r.number("base_accuracy"))
            for r in found
        ]
        at = [reached(row, SHARE) for row in found]
        there = [value for value in at if value is not None]
        ends = {name: [fmean(row.series(name)[-3:]) for row in found] for name in ("entropy", "length")}
        lines.append(
            [
                plan.ARMS[arm].title,
                str(len(found)),
                _shown(gains, 2),
                _shown(there, 1) if len(there) == len(at) else f"{len(there)} of {len(at)}",
                *(_shown([row.number(f"eval_{name}") for row in found], 3) for name in ("reverse_kl", "forward_kl")),
                *(f"{fmean(values):.2f}" for values in ends.values()),
            ]
        )
    steps = measured[0].setting.steps
    return (
        f"## Divergences and supports\n\nAll arms: AdamW, rate {measured[0].setting.lr:g}, {steps} updates of {plan.ROLLOUTS} rollouts, so as many "
        "teacher tokens. KL to the teacher on held-out prompts in nats per token, on the student's own samples after the last "
        "update; entropy and length are means of the last three steps' rollouts. Means and 95 % intervals over seeds.\n\n"
        + markdown.table(head, lines)
    )


def _shown(values: Sequence[float], digits: int) -> str:
    low, high = mean_interval(values)
    return f"{fmean(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

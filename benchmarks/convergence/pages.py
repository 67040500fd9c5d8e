"""results/convergence: ratios.csv, the tables as Markdown, the figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median

from benchmarks import FOLDER, ROOT, markdown
from benchmarks.convergence import distiller, outside, plan
from benchmarks.convergence.cost import STAGES, Signal, read_costs, read_signals
from benchmarks.convergence.figure import curves, ratio_map
from benchmarks.convergence.methods import METHODS
from benchmarks.convergence.report import (
    Comparison,
    Group,
    Seconds,
    compare,
    comparison,
    grid_table,
    groups,
    is_rl,
    steps_table,
    write_ratios,
)
from benchmarks.convergence.store import LEVELS, Row, Setting, Store
from benchmarks.convergence.train import DAMPED, NATURAL, NATURALS

DRAWN = (
    ("grpo16", "adamw"), ("grpo4_warm", "muon"), ("grpo16", DAMPED), ("reverse_kl", "muon"), ("reverse_kl", NATURAL), ("seq_kd", "muon"),
)  # fmt: skip
README = FOLDER / "README.md"
SOONER = ROOT / "docs" / "sooner.md"
START, END = "<!-- written by make evidence -->\n", markdown.END
LAST = 5  # evaluations whose mean is where a run ended


def write_pages(folder: Path, tuned: Store, runs: Store) -> None:
    """From what is there; parts that have not run are left out."""
    seconds = read_costs(folder / "costs.csv")
    main = groups(runs.of(plan.report(tuned)))
    small = groups(runs.of(plan.small_batch(tuned)))
    mapped = groups(runs.of(plan.ratio_map(tuned)))
    timed = ["steps", "rollouts", "seconds"]
    timed_main = timed if all((g.cell, *g.arm) in seconds for g in main) else timed[:2]
    in_main = compare(main, seconds, measures=timed_main)
    across = _across(main, small, seconds)
    in_map = compare(mapped, seconds, measures=timed[:2])
    in_small = compare(small, seconds, measures=timed[:2])
    write_ratios(folder / "ratios.csv", [*in_main, *in_small, *in_map])
    parts = [_main(main, in_main, seconds), _batch(across), _endings(tuned, runs), _teachers(tuned, runs)]
    everywhere = [*main, *small, *mapped] if mapped else []
    in_all = [*in_main, *in_small, *in_map]
    parts += [_map_table(in_all, everywhere), _signal(read_signals(folder / "signal.csv"))]
    parts += [distiller.table(outside.read_runs(folder / "distiller.csv"))]
    parts += [outside.table(outside.read_runs(folder / "trl.csv")), _grid(tuned)]
    text = "\n\n".join(part for part in parts if part) + "\n"
    (folder / "tables.md").write_text(text)
    markdown.put_between(README, START, text.replace("## ", "### "))
    if headline := _headline(main, across):
        markdown.put_between(SOONER, START, headline)
    if timed_main == timed and main:
        (folder / "curves.svg").write_text(curves(main, DRAWN, seconds))
    if cells := _map_cells(in_all, everywhere):
        (folder / "map.svg").write_text(ratio_map(cells))


def _headline(main: Sequence[Group], across: Sequence[Comparison]) -> str:
    """The rows that docs/sooner.md quotes: the fewest updates of GRPO to 80 %, and distillation in three measures."""
    at_80 = _by_arm(c for c in across if c.level == 80)
    full = [g for g in main if is_rl(g.method) and g.reached(80) == len(g.rows)]
    if not at_80 or not full:
        return ""
    best = min(full, key=lambda g: g.mean(80))
    lines = [
        "| to 80 % of the teacher's gain | rollouts a step | updates | fewer updates than the best GRPO | fewer rollouts | less CPU time |",
        "|---|---:|---:|---:|---:|---:|",
        f"| {best.title}: the best one | {best.rollouts} | {best.mean(80):.0f} | | | |",
    ]
    for found in at_80.values():
        group = found["steps"].group
        ratios = " | ".join(_ratio(found[m]) for m in ("steps", "rollouts", "seconds"))
        lines.append(f"| {group.title} | {group.rollouts} | {group.mean(80):.0f} | {ratios} |")
    return "\n".join(lines) + "\n"


def _by_arm(compared: Iterable[Comparison]) -> dict[tuple[str, str, str, int], dict[str, Comparison]]:
    """By measure, of every arm at every level."""
    rows: dict[tuple[str, str, str, int], dict[str, Comparison]] = {}
    for c in compared:
        rows.setdefault((c.group.cell, *c.group.arm, c.level), {})[c.measure] = c
    return rows


def _main(main: Sequence[Group], compared: Sequence[Comparison], seconds: Seconds) -> str:
    if not main:
        return ""
    rows = max((g.rows for g in main), key=len)
    base, teacher = ([r.number(n) for r in rows] for n in ("base_accuracy", "teacher_accuracy"))
    made = fmean(r.number("teacher_seconds") for r in rows)
    return (
        f"## Updates to a share of the teacher's gain\n\n8 digits, 256 rollouts a step, {len(rows)} seeds. Base accuracy "
        f"{min(base):.4f} to {max(base):.4f}, teacher {min(teacher):.3f} to {max(teacher):.3f}; making the teacher took "
        f"{plan.MAIN.teacher_steps} updates, {plan.MAIN.teacher_steps * 256} rollouts and {made:.0f} CPU s. Mean (lowest–highest) over "
        "seeds; where not every seed got there, how many did. Ratios: the best GRPO in that measure over this method, with 95 % "
        f"intervals.\n\n{steps_table(main, compared, seconds)}"
    )


def _across(main: Sequence[Group], small: Sequence[Group], seconds: Seconds) -> list[Comparison]:
    """Each arm of either batch against the cheapest GRPO of both, in rollouts and in CPU time."""
    both = [*main, *small]
    both = [g for g in both if (g.cell, *g.arm) in seconds]
    pool = [g for g in both if is_rl(g.method)]
    found = [g for g in both if g.method == "reverse_kl"] if small else []
    return [
        c
        for g in found
        for level in LEVELS
        for measure in ("steps", "rollouts", "seconds")
        if (c := comparison(g, pool, level, measure, seconds)) is not None
    ]


def _batch(across: Sequence[Comparison]) -> str:
    if not across:
        return ""
    lines = [
        "## The batch chosen for each\n\nReverse KL with 256 and with 64 rollouts a step against whichever GRPO, of either batch, needs "
        "the fewest updates, the fewest rollouts, or the least CPU time; in brackets its rollouts a step. With 64 rollouts OPD sees as "
        "many prompts a step as GRPO does with 256 in groups of 4.\n",
        "| method | rollouts a step | level | updates | fewer updates | fewer rollouts | less CPU |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for found in _by_arm(across).values():
        group, level = found["steps"].group, found["steps"].level
        ratios = [f"{_ratio(c)} [{c.reference.rollouts}]" for c in (found[m] for m in ("steps", "rollouts", "seconds"))]
        lines.append(
            f"| {group.title} | {group.rollouts} | {level} % | {group.mean(level):.0f} | " + " | ".join(ratios) + " |"
        )
    return "\n".join(lines)


def _ratio(c: Comparison) -> str:
    return f"{c.bound}{c.interval}"


def _short(group: Group) -> str:
    return f"{group.title}, {group.rollouts}"


def _ending(row: Row) -> float:
    return fmean(row.curve.values[-LAST:])


def _endings(tuned: Store, runs: Store) -> str:
    found = groups(runs.of(plan.endings(tuned)))
    if not found:
        return ""
    seeds = [int(r["seed"]) for r in found[0].rows]
    lines = [
        f"## Where a hybrid ends\n\nAccuracy after {plan.ENDING_STEPS} updates (mean of the last {LAST} evaluations), Muon, each from its own "
        "tuned rate linearly to 0.\n",
        "| method | " + " | ".join(f"seed {s}" for s in seeds) + " | mean |",
        "| --- |" + " ---: |" * (len(seeds) + 1),
    ]
    for g in found:
        ends = [_ending(r) for r in g.rows]
        lines.append(
            f"| {METHODS[g.method].title} | " + " | ".join(f"{e:.3f}" for e in ends) + f" | {fmean(ends):.3f} |"
        )
    teachers = [r.number("teacher_accuracy") for r in found[0].rows]
    lines.append("| the teacher | " + " | ".join(f"{t:.3f}" for t in teachers) + f" | {fmean(teachers):.3f} |")
    return "\n".join(lines)


def _teachers(tuned: Store, runs: Store) -> str:
    found = groups(runs.of(plan.two_teachers(tuned)))
    if not found:
        return ""
    lines = [
        "## Two specialised teachers, one student\n\nOne sorts upwards, the other downwards; prompts take turns, each read by its own "
        "teacher. Share of each teacher's gain on its own domain at the end.\n",
        "| method | updates | upwards, by seed | downwards, by seed |",
        "| --- | ---: | --- | --- |",
    ]
    for g in found:
        gains = [[float(x) for x in r["domain_gains"].split()] for r in g.rows]
        each = [" ".join(f"{pair[d]:.3f}" for pair in gains) for d in (0, 1)]
        lines.append(f"| {g.title} | {g.rows[0]['max_steps']} | {each[0]} | {each[1]} |")
    return "\n".join(lines)


def _map_cells(compared: Sequence[Comparison], mapped: Sequence[Group]) -> list[tuple[str, str, str, str, float]]:
    """Column, row, two lines of text and the ratio to 80 % of the best distillation arm."""
    cells = []
    for cell in (plan.MAIN, plan.SMALL_BATCH, *plan.MAP):
        ratios = [
            c
            for c in compared
            if c.group.cell == cell.name and c.level == 80 and c.measure == "steps" and not is_rl(c.group.method)
        ]
        here = [g for g in mapped if g.cell == cell.name]
        if not here:
            continue
        base = fmean(r.number("base_accuracy") for r in here[0].rows)
        larger = ", larger teacher" if cell.teacher_hidden > cell.hidden else ""
        column, row = f"{cell.rollouts} rollouts a step", f"{cell.digits} digits, base at {base:.2f}{larger}"
        if ratios:
            best = max(ratios, key=lambda c: c.interval.value)
            first = max(
                (c for c in ratios if c.group.optimizer not in NATURALS), key=lambda c: c.interval.value, default=None
            )
            second = "" if first is None else f"first order: {first.bound}{first.interval}"
            cells.append((column, row, f"{best.bound}{best.interval}", second, best.interval.value))
    return cells


def _map_table(compared: Sequence[Comparison], mapped: Sequence[Group]) -> str:
    if not mapped:
        return ""
    lines = [
        "## Where the ratio is what\n\nUpdates to 80 % of the teacher's gain, mean over the seeds. Outside the main cell every arm ran at "
        "the main cell's rate, half of it and, GRPO, a quarter; the best counts.\n",
        "| cell | base | teacher | method | updates | best GRPO | ratio |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    arms = set(plan.MAP_ARMS)
    for g in mapped:
        if g.arm not in arms:
            continue
        found = next((c for c in compared if c.group is g and c.level == 80 and c.measure == "steps"), None)
        if is_rl(g.method):
            continue
        base, teacher = (fmean(r.number(n) for r in g.rows) for n in ("base_accuracy", "teacher_accuracy"))
        steps = f"{g.mean(80):.0f}" if found else f"{g.reached(80)} of {len(g.rows)}"
        against = f"{found.bound}{found.reference.mean(80):.0f} ({_short(found.reference)})" if found else ""
        ratio = f"{found.bound}{found.interval}" if found else ""
        lines.append(f"| {g.cell} | {base:.3f} | {teacher:.2f} | {g.title} | {steps} | {against} | {ratio} |")
    return "\n".join(lines)


def _signal(found: Sequence[Signal]) -> str:
    if not found:
        return ""
    lines = [
        "## What a rollout says\n\nRollouts a batch needs for a gradient signal-to-noise ratio of one, B = tr Σ / |g|² (median over seeds), "
        "at the base and where the student has made half and nine tenths of the way.\n",
        "| method | " + " | ".join("base" if not s else f"{s:.0%} of the gain" for s in STAGES) + " |",
        "| --- |" + " ---: |" * len(STAGES),
    ]
    for method in dict.fromkeys(s.method for s in found):
        values = [median(s.batch for s in found if s.method == method and s.stage == stage) for stage in STAGES]
        lines.append(f"| {METHODS[method].title} | " + " | ".join(f"{v:.0f}" for v in values) + " |")
    return "\n".join(lines)


def _grid(tuned: Store) -> str:
    """The rates that were tried, without rows of other grids."""
    wanted: Iterable[Setting] = plan.grid()
    rows = tuned.of(wanted)
    if not rows:
        return ""
    return (
        "## Learning rates\n\nUpdates to 80 % on the tuning seed, the chosen rate bold (it has the fewest updates to 50, 80 and 90 % together); "
        "in brackets the share of the gain where 80 % was not reached. Of the natural gradient: trust regions in nats per token.\n\n"
        + grid_table(rows, plan.GRID, plan.score)
    )

"""compression.md from the lines of compression.csv."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.markdown import table
from benchmarks.real.compression import plan
from benchmarks.real.compression.plan import ARMS, FULL, INT4, NF4
from benchmarks.real.store import Row, Store
from opd.reporting.intervals import mean_interval

ABOUT = """# A quantised student, recovered by its full-precision self

The student is SmolLM2-135M-Instruct with the linear layers of its blocks in 4 bits, and the teacher is the same model before that.
`python -m benchmarks real_compression` does what is missing of the runs, and writes this page from
[compression.csv](compression.csv). A run has {steps} steps of {prompts} chat prompts, with one response of at most {tokens} tokens each,
and AdamW whose rate falls to 0 along a cosine.

Each model is measured on {measured} prompts about topics that training has not seen. KL is in nats per token, at tokens that the
student draws. Brackets hold 95 % intervals over prompts, of the mean of {seeds} seeds; parentheses hold the lowest and the highest seed.
"Prose" are paragraphs of this repository's documentation, and "answers" are the teacher's own to the same prompts. Teacher tokens are
those that the teacher has scored; off-policy KD has it draw them, too.
"""
TITLES = {FULL: "full precision (the teacher)", INT4: "4 bits, rounded to nearest", NF4: "NF4"}
ABOUT_PARTS = {
    INT4: """## All weights, trained through rounded layers

Weights are symmetric 4-bit integers with one scale per row (the file that this model comes from has 4 bits too, in groups of 32 with a
minimum). Training fake-quantises them by torchao, and moves all weights. The measured student holds the rounded weights alone.
""",
    NF4: """## Adapters on NF4 (QLoRA)

Weights are bitsandbytes' NF4, which stays as it is. Adapters of rank 16 beside it are trained and kept in full precision.
""",
}
HEAD = ("", "reverse KL", "forward KL", "perplexity, prose", "perplexity, answers", "teacher tokens", "CPU s")


def write(store: Store, path: Path) -> None:
    path.write_text(page(store), encoding="utf-8")


def page(store: Store) -> str:
    """The whole page, of the runs that are there. Raises ValueError without the untrained ones."""
    ends = store.of([plan.untrained(weights) for weights in (FULL, INT4)])
    if len(ends) != 2:
        raise ValueError("compression.csv lacks the untrained models; run python -m benchmarks real_compression.")
    prompts = len(ends[0].series("reverse_kl"))
    about = ABOUT.format(
        steps=plan.STEPS, prompts=plan.PROMPTS, tokens=plan.TOKENS, measured=prompts, seeds=len(plan.SEEDS)
    )
    parts = [about]
    for weights in (INT4, NF4):
        before = store.of([plan.untrained(weights)])
        if before:
            parts.append(_part(store, weights, ends[0], before[0]))
    return "\n".join(parts)


def _part(store: Store, weights: str, full: Row, before: Row) -> str:
    """The table of one way to quantise, what it says, and its grid."""
    runs = {arm: store.of(plan.final(store, weights, arm)) for arm in ARMS}
    lines = [_line(TITLES[FULL], [full]), _line(TITLES[weights], [before])]
    lines += [
        _line(f"{ARMS[arm].title}, lr {rows[0]['lr']}", rows)
        for arm, rows in runs.items()
        if len(rows) == len(plan.SEEDS)
    ]
    said = [ABOUT_PARTS[weights], table(HEAD, lines), ""]
    if all(len(rows) == len(plan.SEEDS) for rows in runs.values()):
        said += [*_recovered(runs, full, before), ""]
    grid = [row for arm in ARMS for row in store.of(plan.grid(store, weights, arm))]
    if grid:
        head = ("rates on the tuning seed and the tuning prompts", "lr", *HEAD[1:5])
        rows = [(ARMS[row["arm"]].title, row["lr"], *_numbers([row])[:4]) for row in grid]
        said += ["Each arm has the rate with its lowest reverse KL.", "", table(head, rows), ""]
    return "\n".join(said)


def _line(title: str, rows: Sequence[Row]) -> tuple[str, ...]:
    return (title, *_numbers(rows))


def _numbers(rows: Sequence[Row]) -> list[str]:
    """The cells of one line: distances, perplexities, costs."""
    cells = [_interval(per_prompt(rows, name)) for name in plan.PER_PROMPT]
    cells += [_range([math.exp(row.number(name)) for row in rows]) for name in ("prose_nats", "teacher_text_nats")]
    return [
        *cells,
        f"{fmean(row.number('teacher_tokens') for row in rows):,.0f}",
        f"{fmean(row.number('cpu_seconds') for row in rows):,.0f}",
    ]


def per_prompt(rows: Sequence[Row], name: str) -> list[float]:
    """The mean of the runs for each prompt."""
    return [fmean(values) for values in zip(*(row.series(name) for row in rows), strict=True)]


def _recovered(runs: dict[str, list[Row]], full: Row, before: Row) -> list[str]:
    """Sentences: the share of the loss that is gone, and the difference of the arms, paired by prompt."""
    said = []
    for arm, rows in runs.items():
        parts = [f"{share(rows, before, full, name):.0%} of the {label}" for name, label in MEASURES.items()]
        said.append(f"{ARMS[arm].title}: gone are {', '.join(parts[:-1])} and {parts[-1]} that rounding added.")
    opd, other = runs["opd"], runs["off_policy"]
    for name in plan.PER_PROMPT:
        pairs = zip(per_prompt(opd, name), per_prompt(other, name), strict=True)
        low, high = mean_interval(differences := [a - b for a, b in pairs])
        said.append(
            f"{MEASURES[name].capitalize()}, OPD less off-policy KD: {fmean(differences):+.3f} [{low:+.3f}, {high:+.3f}] nats per "
            f"token. {verdict(low, high)}"
        )
    for name in ("prose_nats", "teacher_text_nats"):
        by_seed = ", ".join(f"{a.number(name) - b.number(name):+.3f}" for a, b in zip(opd, other, strict=True))
        said.append(f"{MEASURES[name].capitalize()}, OPD less off-policy KD, by seed: {by_seed} nats per token.")
    return [" ".join(said[:2]), "", *(f"- {line}" for line in said[2:])]


MEASURES = {
    "reverse_kl": "reverse KL",
    "forward_kl": "forward KL",
    "prose_nats": "loss on prose",
    "teacher_text_nats": "loss on the teacher's answers",
}


def share(rows: Sequence[Row], before: Row, full: Row, name: str) -> float:
    """1 − what is left of the distance from the full-precision model, as a share of what it was after rounding."""

    def value(row: Row) -> float:
        return plan.mean(row, name) if name in plan.PER_PROMPT else row.number(name)

    return 1 - (fmean(map(value, rows)) - value(full)) / (value(before) - value(full))


def verdict(low: float, high: float) -> str:
    """One sentence on an interval of OPD less off-policy KD, where less is better."""
    if high < 0:
        return "OPD is closer."
    return "Off-policy KD is closer." if low > 0 else "The interval does not tell them apart."


def _interval(values: Sequence[float]) -> str:
    low, high = mean_interval(values)
    return f"{fmean(values):.3f} [{low:.3f}, {high:.3f}]"


def _range(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"

"""False alarms of the guard's default thresholds on healthy runs, and how soon they see runs that collapse.

`python -m benchmarks guard` fits the models of `opd demo` once, trains every recipe below, and writes benchmarks/results/guard.md. A run
is healthy when its held-out accuracy did not fall, and collapsed when it ends below where it began or answers have no end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, markdown

STEPS = 60
SMALL: Mapping[str, Any] = {
    "train.steps": STEPS,
    "train.prompts_per_step": 64,
    "eval.every": STEPS,
    "eval.prompts": 128,
    "eval.extra_temperatures": [],
    "checkpoint.every": 0,
    "log.progress": "off",
    "log.show_samples": 0,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One recipe, as what it changes in the demo's."""

    what: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    collapses: bool = False


def _case(what: str, collapses: bool = False, **settings: Any) -> Case:
    return Case(
        what=what,
        collapses=collapses,
        settings={name.replace("__", "."): value for name, value in settings.items()},
    )


REWARD = {"rl__reward": "exact_match", "rl__weight": 1.0, "train__samples_per_prompt": 8, "train__prompts_per_step": 16}
CASES = (
    *(_case(f"reverse KL, seed {seed}", seed=seed) for seed in range(4)),
    _case("reverse KL, lr 5e-4", optimizer__lr=5e-4),
    _case("reverse KL, lr 4e-3", optimizer__lr=4e-3),
    _case("reverse KL, Muon", optimizer__name="muon", optimizer__lr=0.02),
    _case("reverse KL, constant rate", optimizer__schedule="constant"),
    _case("forward KL", objective__divergence="forward_kl"),
    _case("JSD", objective__divergence="generalized_jsd"),
    _case("skewed reverse KL", objective__divergence="skew_reverse_kl"),
    _case("total variation", objective__divergence="total_variation"),
    _case("top 4, bucket", objective__support="teacher_top_k", objective__top_k=4),
    _case(
        "k1, sampled token", objective__support="sampled", objective__estimator="k1", objective__delivery="advantage"
    ),
    _case("LoRA", student__lora__rank=8, optimizer__lr=1e-2),
    _case("half off-policy", rollout__lmbda=0.5, rollout__off_policy="teacher"),
    _case("reverse KL beside a reward", **REWARD),
    _case("sampling at 0.7", rollout__temperature=0.7),
    _case("groups of 4", train__samples_per_prompt=4, train__prompts_per_step=16),
    _case("half the batch, seed 7", train__prompts_per_step=32, seed=7),
    _case("rate 25 times too high", True, optimizer__lr=0.05),
    _case("rate 250 times too high", True, optimizer__lr=0.5),
    _case("rate 50 times too high, forward KL", True, optimizer__lr=0.1, objective__divergence="forward_kl"),
    _case("Muon, rate 50 times too high", True, optimizer__name="muon", optimizer__lr=1.0),
    _case("answers cut at 3 tokens", True, rollout__max_new_tokens=3),
    _case(
        "a reward alone, rate 25 times too high", True, **(REWARD | {"rl__distill_weight": 0.0, "optimizer__lr": 0.05})
    ),
)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks guard", description=__doc__)
    parser.add_argument("--only", nargs="+", type=int, help="numbers of cases; then nothing is written")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args(argv)
    chosen = [CASES[n] for n in args.only] if args.only else list(CASES)
    began, rows = time.monotonic(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="opd-guard-") as folder:
        world = Path(folder)
        from opd.demo.prepare import prepare

        prepare(world / "demo", seed=0, say=print)
        for number, case in enumerate(chosen):
            rows.append(_run(case, world, world / f"run-{number}", args.steps))
            print(json.dumps(rows[-1]), flush=True)
    if not args.only:
        (RESULTS / "guard.md").write_text(page(rows, time.monotonic() - began), encoding="utf-8")
        print(f"Written: {RESULTS / 'guard.md'}")
    return 0


def _run(case: Case, world: Path, run: Path, steps: int) -> dict[str, Any]:
    from opd import Distiller
    from opd.config.recipe import build, merge, read_recipe
    from opd.demo.recipe import recipe_path
    from opd.reporting.guarded import read_onsets

    given = {
        "student.model": str(world / "demo" / "base"),
        "teacher.model": str(world / "demo" / "teacher"),
        "prompts.path": str(world / "demo" / "train.jsonl"),
        "prompts.eval_path": str(world / "demo" / "eval.jsonl"),
        "run_dir": str(run),
    }
    values = {**SMALL, **given, **case.settings, "train.steps": steps, "eval.every": steps}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        config = build(merge(read_recipe(recipe_path()), values))
        trained = Distiller.from_config(config).train(overwrite=True)
    summary: Any = trained.summary
    before, after = (summary[name]["accuracy"] for name in ("student_before", "student_after"))
    first: dict[str, int] = {}
    for onset in read_onsets(run):
        first.setdefault(onset.rule, onset.step + 1)
    return {"what": case.what, "collapses": case.collapses, "before": before, "after": after, "alarms": first}


def page(rows: Sequence[Mapping[str, Any]], seconds: float) -> str:
    """The page of results."""
    healthy, collapsed = ([row for row in rows if row["collapses"] == wanted] for wanted in (False, True))
    false = [row for row in healthy if row["alarms"]]
    seen = [row for row in collapsed if row["alarms"]]
    lines = ["# Thresholds of the guard", "", f"`python -m benchmarks guard`: {len(rows)} runs of `opd demo`'s task, {STEPS} steps each, {seconds:.0f} s.", ""]  # fmt: skip
    lines += [f"- False alarms: {len(false)} of {len(healthy)} healthy runs.", f"- Seen: {len(seen)} of {len(collapsed)} runs that collapse.", ""]  # fmt: skip
    lines += ["All rules have their defaults. A step is the first at which a rule acted. Accuracies are of sampled answers to held-out prompts.", ""]  # fmt: skip
    for title, some in (("Healthy", healthy), ("Made to collapse", collapsed)):
        cells = [
            [
                row["what"],
                f"{row['before']:.0%}",
                f"{row['after']:.0%}",
                ", ".join(f"{rule}: {step}" for rule, step in row["alarms"].items()) or "none",
            ]
            for row in some
        ]
        head = ["run", "accuracy before", "after", "alarms (rule: step)"]
        lines += [f"## {title}", "", markdown.table(head, cells, numbers=False), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A chat model forgets how to chat, and the ways back: on-policy distillation from the original, its answers as data, and mixing.

What is missing of results/real/recovery.csv is run, then recovery.md is written; it may be stopped and called again. A line is one model
with its whole setting. Work goes to $OPD_REAL, or runs/real.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import RESULTS as ALL_RESULTS
from benchmarks import ROOT
from benchmarks.markdown import put_between
from benchmarks.real.recovery import plan
from benchmarks.real.recovery.arms import prepare
from benchmarks.real.recovery.figure import scatter
from benchmarks.real.recovery.report import groups, headline, page
from benchmarks.real.recovery.run import perform
from benchmarks.real.store import Row, Store, fill

RESULTS = ALL_RESULTS / "real"
TABLE, PAGE, FIGURE = RESULTS / "recovery.csv", RESULTS / "recovery.md", RESULTS / "recovery.svg"
DOCS, START = ROOT / "docs" / "recovery.md", "<!-- written by python -m benchmarks real_recovery -->\n"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks real_recovery", description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--arms", nargs="+", choices=tuple(plan.ARMS), default=tuple(plan.ARMS))
    parser.add_argument("--only", choices=("grid", "report"), help="the learning rates alone, or the page alone")
    parser.add_argument(
        "--smoke", action="store_true", help="two updates of every arm with a tiny model, in a folder that is deleted"
    )
    parser.add_argument(
        "--make",
        action="store_true",
        help="make the models and prompts of recipes/smollm2/recovery.yaml, and nothing else",
    )
    options = parser.parse_args(argv)
    if options.make:
        print(prepare(plan.SEEDS[0]))
        return 0
    if options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            for row in smoke(Path(folder)):
                print(_line(row), flush=True)
        return 0
    store = plan.store(TABLE)
    if options.only != "report":
        _fill(store, plan.baselines((plan.TUNING_SEED,)), options.workers)
        _fill(store, plan.grid(options.arms), options.workers)
    if options.only is None:
        _fill(store, plan.baselines(plan.SEEDS), options.workers)
        _fill(store, [one for one in plan.reported(store) if one.arm in options.arms], options.workers)
    PAGE.write_text(page(store), encoding="utf-8")
    found = groups(store)
    if said := headline(found):
        FIGURE.write_text(scatter(found), encoding="utf-8")
        put_between(DOCS, START, said)
    return 0


def _fill(store: Store, settings: Sequence[plan.Setting], workers: int) -> None:
    for row in fill(store, settings, perform, workers):
        print(f"{time.strftime('%H:%M')} {_line(row)}", flush=True)


def _line(row: Row) -> str:
    return (
        f"{row['arm']} {row['lr']} seed {row['seed']}: reverse KL {plan.mean(row, 'reverse_kl'):.3f}, forward KL "
        f"{plan.mean(row, 'forward_kl'):.3f}, skill {row.number('skill'):.3f}, {row['training_tokens'] or 0} tokens, CPU "
        f"{row['cpu_seconds'] or 0} s"
    )


def smoke(folder: Path, arms: Sequence[str] = tuple(plan.ARMS)) -> list[Row]:
    """The baselines, and two updates of every arm, on one seed; in this process but for `opd train`, from a tiny model instead of the real one."""
    from opd.testing import byte_tokenizer, save_model, tiny_causal_lm
    from opd.testing.tokenizers import CHAT_TEMPLATE

    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    tiny = save_model(tiny_causal_lm(tokenizer, initializer_range=0.2), tokenizer, folder / "tiny")
    kept = {name: os.environ.get(name) for name in ("OPD_REAL", "OPD_REAL_MODEL")}
    os.environ |= {"OPD_REAL": str(folder), "OPD_REAL_MODEL": tiny}
    try:
        seed = plan.SEEDS[0]
        settings = plan.baselines([seed])
        settings += [replace(plan.setting(arm, 1e-3, seed, steps=2), chat=4, tokens=8) for arm in arms]
        return [perform(one, prompts=4) for one in settings]
    finally:
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})

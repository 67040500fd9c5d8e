"""A quantised student, recovered by its full-precision self: does what is missing of the runs, then writes compression.md."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from benchmarks import RESULTS as ALL_RESULTS
from benchmarks.real.compression import plan
from benchmarks.real.compression.plan import INT4, NF4, Setting
from benchmarks.real.compression.report import write
from benchmarks.real.compression.run import perform
from benchmarks.real.store import Row, Store, fill
from benchmarks.real.world import original

RESULTS = ALL_RESULTS / "real"
SMOKE_RATE = 1e-3


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks real_compression", description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--smoke", action="store_true", help="two steps of each arm with a tiny model; nothing is kept")
    parser.add_argument(
        "--qlora", action="store_true", help="also adapters on NF4, by bitsandbytes (pip install bitsandbytes)"
    )
    parser.add_argument(
        "--page", action="store_true", help="run nothing, and write the page of the runs that are there"
    )
    options = parser.parse_args(argv)
    if options.smoke:
        with tempfile.TemporaryDirectory() as folder:
            smoke(Path(folder))
        return 0
    store = Store(RESULTS / "compression.csv", plan.SETTING, plan.RESULTS)
    kinds = [INT4, NF4] if options.qlora else [INT4]
    for settings in [] if options.page else plan.rounds(store, kinds):
        _fill(store, settings, original(), options.workers)
    write(store, RESULTS / "compression.md")
    return 0


def smoke(folder: Path) -> Store:
    """Two steps of each arm with a tiny model, in this process."""
    from opd.testing import byte_tokenizer, save_model, tiny_causal_lm

    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    tokenizer = byte_tokenizer(chat_template=template)
    model = save_model(tiny_causal_lm(tokenizer, initializer_range=0.2), tokenizer, folder / "model")
    store = Store(folder / "compression.csv", plan.SETTING, plan.RESULTS)
    kinds = [INT4, NF4] if find_spec("bitsandbytes") else [INT4]
    settings = [plan.untrained(weights) for weights in (plan.FULL, *kinds)]
    settings += [replace(plan.setting(weights, arm, SMOKE_RATE, 0), steps=2) for weights in kinds for arm in plan.ARMS]
    for setting in settings:
        store.add(row := perform(setting, Path(model)))
        _say(row)
    return store


def _fill(store: Store, settings: Sequence[Setting], model: Path, workers: int) -> None:
    for row in fill(store, settings, partial(perform, model=model), workers):
        _say(row)


def _say(row: Row) -> None:
    found = f"reverse KL {plan.mean(row, 'reverse_kl'):.4f}, forward KL {plan.mean(row, 'forward_kl'):.4f}"
    texts = f"prose {row['prose_nats']}, teacher's answers {row['teacher_text_nats']} nats"
    name = " ".join(row[column] for column in ("weights", "arm", "lr", "seed"))
    print(f"{time.strftime('%H:%M')} {name}: {found}, {texts}, {row['cpu_seconds']} s", flush=True)

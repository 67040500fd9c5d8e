"""A step of several ranks with a thread and a core each, beside the same step of one: seconds, CPU seconds, and the share of waiting.

`python -m benchmarks ranks` makes a student and a teacher, takes the same steps with one process and with two, divided or not, in turn,
and writes benchmarks/results/ranks.csv and ranks.md. Nothing else should run meanwhile: time that another process takes looks like waiting.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from benchmarks import RESULTS, ROOT
from benchmarks.markdown import table
from benchmarks.rows import Row, write
from opd.ranks import STARTED_BY
from opd.testing import byte_tokenizer, save_model, tiny_causal_lm

WARM_UP = 1
ONE = "one process"
LIMIT_S = 1800
LOSS_TOLERANCE = 1e-4  # relative: the same rollouts, and sums in another order
COLUMNS = (
    "way", "ranks", "round", "step", "hidden", "layers", "vocabulary", "rollouts", "tokens",
    "seconds", "cpu_seconds", "cpu_seconds_of_all", "waiting", "loss", "machine",
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks ranks", description=__doc__)
    parser.add_argument("--ranks", type=int, default=os.cpu_count() or 1, help="beside one; default all cores")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each")
    parser.add_argument("--steps", type=int, default=4, help="of a run; the first is not timed")
    parser.add_argument("--prompts", type=int, default=32, help="per step")
    parser.add_argument("--tokens", type=int, default=64, help="of a response at most")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for ranks.csv and ranks.md")
    options = parser.parse_args(argv)
    if options.steps <= WARM_UP:
        parser.error(f"--steps {options.steps} leaves no step to time; it has to be at least {WARM_UP + 1}.")
    if options.ranks < 2:
        parser.error(f"--ranks {options.ranks} is one process, which is measured anyway; give 2 or more.")
    ways = [(ONE, 1), ("ddp", options.ranks), ("fsdp2", options.ranks)]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_inputs(Path(scratch), options)
        for number in range(options.rounds):
            for way, ranks in ways:
                steps = run(folder, recipe(folder, way, options), options.steps, ranks)
                rows += [row(options, way, ranks, number, step, taken) for step, taken in enumerate(steps)]
                check(rows)
    rows = [one for one in rows if int(one["step"]) >= WARM_UP]
    write(options.results / "ranks.csv", COLUMNS, rows)
    text = page(rows)
    (options.results / "ranks.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def make_inputs(folder: Path, options: argparse.Namespace) -> Path:
    """Student, teacher and prompts of several lengths."""
    tokenizer = byte_tokenizer()
    shape: dict[str, Any] = {
        "hidden": options.hidden,
        "heads": max(2, options.hidden // 64),
        "layers": options.layers,
        "vocab_size": options.vocabulary,
    }
    for name, seed in (("student", 1), ("teacher", 2)):
        save_model(tiny_causal_lm(tokenizer, seed=seed, **shape), tokenizer, folder / name)
    prompts = [{"prompt": "once upon a time " * (1 + i % 4) + str(i)} for i in range(1000)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in prompts), encoding="utf-8")
    return folder


def recipe(folder: Path, way: str, options: argparse.Namespace) -> dict[str, Any]:
    """The same training for all; what only looks on is off."""
    return {
        "run_dir": str(folder / "run"),
        "student.model": str(folder / "student"),
        "teacher.model": str(folder / "teacher"),
        "prompts.path": str(folder / "prompts.jsonl"),
        "rollout.max_new_tokens": options.tokens,
        "rollout.batch_size": max(1, options.prompts // options.ranks),
        "train.prompts_per_step": options.prompts,
        "train.samples_per_prompt": 1,
        "train.steps": options.steps,
        "train.parallel": "ddp" if way == ONE else way,
        "guard.canary.action": "off",
        "eval.every": 0,
    }


def run(folder: Path, settings: dict[str, Any], steps: int, ranks: int) -> list[dict[str, Any]]:
    """What rank 0 has written of every step. Raises SystemExit where a rank fails."""
    case, out, store = (folder / name for name in ("case.json", "seen.json", "store"))
    case.write_text(json.dumps({"recipe": settings, "steps": steps}), encoding="utf-8")
    store.unlink(missing_ok=True)
    own = {
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        STARTED_BY: str(store),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
    }
    command = [sys.executable, "-m", "benchmarks.ranks.worker", str(case), str(out)]
    started = [
        subprocess.Popen(
            command, env=os.environ | own | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=LIMIT_S)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    if any(process.returncode for process in started):
        raise SystemExit("\n".join(text.decode(errors="replace")[-2000:] for text in said))
    return json.loads(out.read_text(encoding="utf-8"))


def row(options: argparse.Namespace, way: str, ranks: int, number: int, step: int, taken: dict[str, Any]) -> Row:
    """A line of the CSV. A step takes as long as its slowest rank; its CPU seconds are those of the busiest."""
    seconds = max(one["seconds"] for one in taken["ranks"])
    cpu = [one["cpu_seconds"] for one in taken["ranks"]]
    waiting = mean(max(0.0, 1 - one["cpu_seconds"] / one["seconds"]) for one in taken["ranks"])
    values = {
        "way": way,
        "ranks": ranks,
        "round": number,
        "step": step,
        "hidden": options.hidden,
        "layers": options.layers,
        "vocabulary": options.vocabulary,
        "rollouts": options.prompts,
        "tokens": taken["tokens"],
        "seconds": f"{seconds:.3f}",
        "cpu_seconds": f"{max(cpu):.3f}",
        "cpu_seconds_of_all": f"{sum(cpu):.3f}",
        "waiting": f"{waiting:.4f}",
        "loss": f"{taken['loss']:.8f}",
        "machine": f"PyTorch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores",
    }
    return {name: str(values[name]) for name in COLUMNS}


def check(rows: Sequence[Row]) -> None:
    """Raise SystemExit where a way took other steps than the rest: then times cannot be compared."""
    for one in rows:
        first = next(other for other in rows if other["step"] == one["step"])
        near = abs(float(one["loss"]) - float(first["loss"])) <= LOSS_TOLERANCE * abs(float(first["loss"]))
        if one["tokens"] != first["tokens"] or not near:
            raise SystemExit(f"step {one['step']}: {one['way']} and {first['way']} differ: {one} and {first}")


def page(rows: Sequence[Row]) -> str:
    """Medians over the timed steps of all rounds, and how often as fast as one process a way is, round by round."""
    ways = list(dict.fromkeys(one["way"] for one in rows))
    first = rows[0]
    lines = []
    for way in ways:
        mine = [one for one in rows if one["way"] == way]
        ranks = mine[0]["ranks"]
        numbers = [
            median(float(one[name]) for one in mine) for name in ("seconds", "cpu_seconds", "cpu_seconds_of_all")
        ]
        lines.append(
            [
                way if way == ONE else f"{ranks} ranks, {way}",
                *(f"{number:.2f}" for number in numbers),
                *(f"{ratio(rows, way, name):.2f}" for name in ("seconds", "cpu_seconds")),
                f"{100 * median(float(one['waiting']) for one in mine):.1f}",
            ]
        )
    head = [
        "way", "seconds", "CPU s of the busiest rank", "CPU s of all", "times as fast", "by CPU s", "waiting, %",
    ]  # fmt: skip
    rounds = len({one["round"] for one in rows})
    return (
        "# A step on several ranks\n\n"
        f"A student and a teacher of {first['layers']} layers, width {first['hidden']} and {int(first['vocabulary']):,} tokens; "
        f"{first['rollouts']} rollouts of a step, {first['tokens']} response tokens in the first; float32, AdamW, reverse KL on the full "
        f"vocabulary; every process has one thread and a core of its own. Medians of {rounds} rounds, in turn; all ways took the same "
        f"steps. {first['machine']}.\n\n"
        f"{table(head, lines)}\n\n"
        '"Times as fast" divides one process\'s seconds by a way\'s, as the median over the rounds. "By CPU s" does the same with the CPU '
        'seconds of the busiest rank, which another process on the machine does not change. "Waiting" is the share of a step in which a '
        "rank uses no CPU, as the mean over ranks: for the others, or for their numbers.\n"
    )


def ratio(rows: Sequence[Row], way: str, name: str) -> float:
    """One process's number over a way's: of medians of a round, their median."""
    found = []
    for number in sorted({one["round"] for one in rows}):
        own, theirs = (
            [float(one[name]) for one in rows if one["way"] == which and one["round"] == number] for which in (ONE, way)
        )
        if own and theirs:
            found.append(median(own) / median(theirs))
    return median(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

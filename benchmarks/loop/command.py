"""opd's training loop against TRL's GKDTrainer: the same models, prompts and objective on a CPU, each in its own environment.

`python -m benchmarks loop` makes the second environment if it is missing, checks that both compute the same loss, runs the two
trainers in turn, each time in a new process, and writes benchmarks/results/loop.csv and loop.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import random
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, markdown
from benchmarks.loop.clock import Case
from benchmarks.trl_environment import run_module, trl_python

TRAINERS = ("opd", "trl")
PHASES = ("rollout", "teacher", "update")
LOSS_TOLERANCE = 1e-6  # nats per token, float32 sums in another order
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ '>' if m['role'] == 'user' else eos_token }}{% endfor %}"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Two models of one shape with random weights, and how much to do with them."""

    vocabulary: int
    hidden: int
    layers: int
    rollouts_per_step: int
    max_new_tokens: int
    warmup_steps: int
    timed_steps: int
    repeats: int


WORKLOADS = {
    "small": Workload(
        vocabulary=13,
        hidden=64,
        layers=2,
        rollouts_per_step=64,
        max_new_tokens=10,
        warmup_steps=5,
        timed_steps=30,
        repeats=5,
    ),
    "wide": Workload(
        vocabulary=32_000,
        hidden=256,
        layers=4,
        rollouts_per_step=8,
        max_new_tokens=64,
        warmup_steps=1,
        timed_steps=4,
        repeats=7,
    ),
}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks loop", description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--threads", type=int, default=1, help="torch threads of either trainer")
    parser.add_argument("--repeats", type=int, help="runs of each trainer, instead of the workload's own number")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for loop.csv and loop.md")
    args = parser.parse_args(argv)

    python = {"opd": sys.executable, "trl": trl_python()}
    with tempfile.TemporaryDirectory() as folder:
        differences = compare_losses(python["trl"], Path(folder))
        runs: list[dict[str, Any]] = []
        for name in args.workloads:
            case = prepare(name, Path(folder) / name, args.threads)
            repeats = args.repeats or WORKLOADS[name].repeats
            runs += [
                run(case, trainer, python[trainer], i, Path(folder)) for i in range(repeats) for trainer in TRAINERS
            ]
            check_same_prompts(runs, name)
    args.results.mkdir(parents=True, exist_ok=True)
    write_csv(args.results / "loop.csv", runs)
    text = report(runs, differences, ["python", "-m", "benchmarks", "loop", *argv], args.threads)
    (args.results / "loop.md").write_text(text)
    print(text)
    return 0


def prepare(name: str, folder: Path, threads: int) -> Case:
    """Student, teacher and prompts on disk, for both trainers."""
    from opd.testing import digit_tokenizer, save_model, tiny_causal_lm

    load = WORKLOADS[name]
    bare = len(digit_tokenizer())
    filler = "".join(chr(0x3400 + i) for i in range(load.vocabulary - bare))  # characters that no prompt contains
    tokenizer = digit_tokenizer(extra=filler, chat_template=CHAT_TEMPLATE)
    paths = {}
    for role, seed in (("student", 1), ("teacher", 2)):
        model = tiny_causal_lm(tokenizer, layers=load.layers, hidden=load.hidden, seed=seed, initializer_range=0.1)
        paths[role] = save_model(model, tokenizer, folder / role)
    steps = load.warmup_steps + load.timed_steps
    generator = random.Random(0)
    rows = []
    for _ in range(steps * load.rollouts_per_step):
        digits = [str(generator.randrange(10)) for _ in range(generator.randint(6, 10))]
        prompt = [{"role": "user", "content": "".join(digits)}]
        rows.append(json.dumps({"prompt": prompt, "response": "".join(sorted(digits))}))
    data = folder / "prompts.jsonl"
    data.write_text("\n".join(rows) + "\n")
    return Case(
        name=name,
        **paths,
        data=str(data),
        rollouts_per_step=load.rollouts_per_step,
        max_new_tokens=load.max_new_tokens,
        steps=steps,
        warmup_steps=load.warmup_steps,
        lr=1e-4,
        threads=threads,
        seed=0,
    )


def run(case: Case, trainer: str, python: str, repeat: int, folder: Path) -> dict[str, Any]:
    """One fresh process; its timed steps as one row."""
    case_path = folder / "case.json"
    case_path.write_text(json.dumps(asdict(case) | {"seed": case.seed + repeat}))
    result = run_module(python, f"benchmarks.loop.{trainer}_worker", folder, str(case_path), threads=case.threads)
    steps = result["steps"][case.warmup_steps :]
    wall, tokens = sum(s["wall"] for s in steps), sum(s["tokens"] for s in steps)
    row: dict[str, Any] = {
        "workload": case.name,
        "trainer": trainer,
        "repeat": repeat,
        "threads": case.threads,
        "steps": len(steps),
        "rollouts_per_step": steps[0]["rollouts"],
        "mean_response_length": tokens / sum(s["rollouts"] for s in steps),
        "steps_per_second": len(steps) / wall,
        "tokens_per_second": tokens / wall,
        "wall_seconds_per_step": statistics.median(s["wall"] for s in steps),
        "cpu_seconds_per_step": statistics.median(s["cpu"] for s in steps),
    }
    for phase in PHASES:
        row[f"{phase}_wall_seconds"] = statistics.median(s["phases"][phase][0] for s in steps)
        row[f"{phase}_cpu_seconds"] = statistics.median(s["phases"][phase][1] for s in steps)
    row["first_loss"] = result["steps"][0]["loss"]
    row["last_loss"] = result["steps"][-1]["loss"]
    row["loss_divisor_per_token"] = statistics.mean(
        s["facts"].get("loss_divisor", s["tokens"]) / s["tokens"] for s in steps
    )
    row["prompts_digest"] = result["prompts"]
    row["same_batch_difference"] = abs(_minus(result.get("same_batch") or (0.0, 0.0)))
    row["versions"] = " ".join(f"{k}={v}" for k, v in result["versions"].items())
    if row["same_batch_difference"] > LOSS_TOLERANCE * max(1.0, row["first_loss"]):
        raise SystemExit(
            f"On one batch of logits the two losses differ by {row['same_batch_difference']}: not comparable."
        )
    print(f"{case.name:6s} {trainer}  run {repeat}: {row['steps_per_second']:.2f} steps/s", file=sys.stderr, flush=True)
    return row


def _minus(pair: Sequence[float]) -> float:
    return pair[0] - pair[1]


def compare_losses(python: str, folder: Path) -> dict[str, dict[str, float]]:
    """Largest differences between the two libraries' generalised JSD, by β; stops when one exceeds the tolerance."""
    differences = run_module(python, "benchmarks.loop.trl_worker", folder, "--check", threads=1)
    worst = max(value for entry in differences.values() for value in entry.values())
    if worst > LOSS_TOLERANCE:
        raise SystemExit(
            f"TRL's and opd's JSD differ by {worst} on the same logits: the comparison would be of two losses."
        )
    return differences


def check_same_prompts(runs: Iterable[dict[str, Any]], workload: str) -> None:
    digests = {r["prompts_digest"] for r in runs if r["workload"] == workload}
    if len(digests) != 1:
        raise SystemExit(f"{workload}: the two trainers did not see the same prompt ids in the same order.")


def write_csv(path: Path, runs: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(runs[0]), lineterminator="\n")
        writer.writeheader()
        for row in runs:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def report(
    runs: Sequence[dict[str, Any]], differences: dict[str, dict[str, float]], command: Sequence[str], threads: int
) -> str:
    """Markdown: speed, where the time goes, and whether the work was the same."""
    pairs = [(w, t) for w in dict.fromkeys(r["workload"] for r in runs) for t in TRAINERS]
    rows = {pair: [r for r in runs if (r["workload"], r["trainer"]) == pair] for pair in pairs}
    speed, work = [], []
    for (workload, trainer), mine in rows.items():
        milliseconds = [f"{1000 * _median(mine, f'{p}_cpu_seconds'):.0f}" for p in PHASES]
        speed.append(
            [
                workload,
                trainer,
                _spread(mine, "steps_per_second"),
                _spread(mine, "tokens_per_second"),
                f"{1000 * _median(mine, 'cpu_seconds_per_step'):.0f}",
                *milliseconds,
            ]
        )
        work.append(
            [
                workload,
                trainer,
                str(mine[0]["rollouts_per_step"]),
                f"{_median(mine, 'mean_response_length'):.2f}",
                _spread(mine, "first_loss"),
                f"{_median(mine, 'loss_divisor_per_token'):.2f}",
            ]
        )
    versions = dict(item.split("=") for r in runs for item in r["versions"].split())
    worst = max(value for entry in differences.values() for value in entry.values())
    same = max(r["same_batch_difference"] for r in runs)
    return (
        "\n".join(
            [
                "# Training loop: opd and TRL's GKDTrainer",
                "",
                f"`{' '.join(command)}`, {threads} thread{'s' if threads > 1 else ''}, Python {platform.python_version()}, "
                + ", ".join(f"{name} {version}" for name, version in versions.items())
                + ".",
                "Median over runs, each in its own process, the two trainers in turn; lowest and highest run in brackets.",
                "",
                markdown.table(
                    [
                        "workload",
                        "trainer",
                        "steps/s",
                        "response tokens/s",
                        "CPU ms/step",
                        *(f"{p} ms" for p in PHASES),
                    ],
                    speed,
                    numbers=False,
                ),
                "",
                "CPU milliseconds are medians over steps, of processor time: other processes on the machine disturb them less than "
                "the wall clock. `update` is everything but sampling and the teacher's forward pass.",
                "",
                "## The same work",
                "",
                markdown.table(
                    [
                        "workload",
                        "trainer",
                        "samplers/step",
                        "response length",
                        "first loss, nats/token",
                        "divisor / tokens",
                    ],
                    work,
                    numbers=False,
                ),
                "",
                f"Prompt ids and their order are identical. On the logits of TRL's first batch the two losses differ by at most {same:.1g} "
                f"nats per token (float32); on random float64 logits, loss and gradient of the generalised JSD differ by at most {worst:.1g} "
                f"for β in {', '.join(differences)}. First losses are of different samples from the same weights.",
                "`divisor / tokens`: GKDTrainer divides the summed loss by the token count of the data set's answers, opd by that of the "
                "samples it trains on.",
                "",
                *_workload_lines(rows),
            ]
        )
        + "\n"
    )


def _workload_lines(rows: Iterable[tuple[str, str]]) -> list[str]:
    names = dict.fromkeys(workload for workload, _ in rows)
    return [
        f"- {name}: Qwen3, {w.layers} layers, hidden size {w.hidden}, {w.vocabulary} tokens, {w.max_new_tokens} new tokens, "
        f"{w.timed_steps} timed steps after {w.warmup_steps}, float32, AdamW."
        for name, w in ((name, WORKLOADS[name]) for name in names)
    ]


def _median(rows: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.median(r[name] for r in rows)


def _spread(rows: Sequence[dict[str, Any]], name: str) -> str:
    values = [r[name] for r in rows]
    return f"{_number(statistics.median(values))} [{_number(min(values))}, {_number(max(values))}]"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

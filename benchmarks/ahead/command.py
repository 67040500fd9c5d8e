"""rollout.ahead=1 against 0: wall-clock seconds of a step, in turn, with vLLM on one core and the trainer on another.

`python -m benchmarks ahead --vllm-python .venv-vllm/bin/python` makes two students of one shape, each with a server of its own, and
writes benchmarks/results/ahead.md. Responses and updates take about equally long by --prompts: an update grows with it, a batch of
vLLM's hardly.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

import opd
from benchmarks import RESULTS, markdown
from opd.testing import byte_tokenizer, save_model, tiny_causal_lm

TRAINER_CORE, SERVER_CORE = 0, 1
WARM_UP = 2  # steps: the first has no rollouts from before, and both compile and allocate
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks ahead", description=__doc__)
    parser.add_argument("--vllm-python", default=sys.executable, help="the interpreter that has vLLM")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="length limit of a response")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    os.environ.update(CPU)
    os.sched_setaffinity(0, {TRAINER_CORE})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        runs = {ahead: _run(args, ahead, Path(folder)) for ahead in (0, 1)}
        try:
            steps = _measure(runs, args.steps)
        finally:
            for run in runs.values():
                run.components.engine.close()
                run.components.draws.close()
    page = _page(args, steps)
    (args.results / "ahead.md").write_text(page, encoding="utf-8")
    print(page)
    return 0


def _run(args: argparse.Namespace, ahead: int, folder: Path) -> Any:
    tokenizer = byte_tokenizer()
    shape: dict[str, Any] = {
        "hidden": args.hidden,
        "heads": args.hidden // 64,
        "layers": args.layers,
        "max_positions": 256,
    }
    for name, seed in (("student", 1), ("teacher", 2)):
        save_model(tiny_causal_lm(tokenizer, architecture="llama", seed=seed, **shape), tokenizer, folder / name)
    return opd.Distiller(
        student=str(folder / "student"),
        teacher=str(folder / "teacher"),
        prompts=[f"{i * 7919 % 1000:03}>" for i in range(1000)],
        rollout={
            "engine": "vllm",
            "vllm": {"python": args.vllm_python},
            "max_new_tokens": args.tokens,
            "batch_size": args.prompts,
            "ahead": ahead,
        },
        train={"steps": WARM_UP + args.steps + 1, "prompts_per_step": args.prompts, "samples_per_prompt": 1},
        optimizer={"lr": 1e-5, "warmup_steps": 0},
        log={"progress": "off"},
        run_dir=folder / f"ahead-{ahead}",
    )


def _measure(runs: dict[int, Any], count: int) -> dict[int, list[dict[str, float]]]:
    """Records of the timed steps, taken in turn; `wall` is a step with its hand-over of the weights."""
    steps: dict[int, list[dict[str, float]]] = {ahead: [] for ahead in runs}
    for turn in range(WARM_UP + count):
        for ahead, run in runs.items():
            began = time.perf_counter()
            record = run.step()
            took = time.perf_counter() - began
            if turn == 0:
                _move_servers()
            if turn >= WARM_UP:
                steps[ahead].append({**record, "wall": took})
    return steps


def _move_servers() -> None:
    for process in psutil.Process().children(recursive=True):
        for thread in process.threads():
            os.sched_setaffinity(thread.id, {SERVER_CORE})


def _page(args: argparse.Namespace, steps: dict[int, list[dict[str, float]]]) -> str:
    def middle(ahead: int, *keys: str) -> float:
        return statistics.median(sum(step[key] for key in keys) for step in steps[ahead])

    ratios = [plain["wall"] / early["wall"] for plain, early in zip(steps[0], steps[1], strict=True)]
    head = ["rollout.ahead", "whole step, s", "waiting for rollouts, s", "teacher and update, s", "staleness"]
    rows = [
        [
            str(ahead),
            f"{middle(ahead, 'wall'):.2f}",
            f"{middle(ahead, 'time/rollout'):.2f}",
            f"{middle(ahead, 'time/teacher', 'time/update'):.2f}",
            f"{statistics.mean(step.get('staleness', 0.0) for step in steps[ahead]):.0f}",
        ]
        for ahead in steps
    ]
    return "\n".join(
        [
            "# The next step's rollouts, drawn while a step updates",
            "",
            f"`python -m benchmarks ahead --steps {args.steps} --prompts {args.prompts} --tokens {args.tokens} --hidden {args.hidden} "
            f"--layers {args.layers}` on {platform.machine()}, vLLM on a core of its own and the trainer on another; medians of "
            f"{len(ratios)} steps of each, taken in turn.",
            "",
            markdown.table(head, rows),
            "",
            f"A step of ahead=0 takes {statistics.median(ratios):.2f} times as long (quartiles "
            f"{' to '.join(f'{q:.2f}' for q in (statistics.quantiles(ratios, n=4)[0], statistics.quantiles(ratios, n=4)[2]))}).",
            "",
        ]
    )

"""The memory estimate against the peak of the process, for twelve small recipes on the CPU.

`python -m benchmarks memory` makes random models, trains each recipe for two steps in a process of its own, and takes off the peak of a
process that trains a model of a few kilobytes in the same way. It writes benchmarks/results/memory.md. No constant is fitted to a recipe.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, markdown

MIB = 1 << 20
TIMEOUT_S = 600
GOAL = 0.15
PROMPT_TOKENS = 16
STEPS = 2
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc gives freed memory back at once, so that the peak is of what was in use, not of its gaps."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A recipe with the sizes of its models."""

    what: str
    student: Mapping[str, Any] = field(default_factory=dict[str, Any])
    teacher: Mapping[str, Any] = field(default_factory=dict[str, Any])
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


SMALL = {"hidden": 256, "layers": 4, "tokens": 4096}
WIDE = {"hidden": 512, "layers": 4, "tokens": 4096}
LONG = {"train.tokens_per_microbatch": 4096, "rollout.max_new_tokens": 112}
CASES = (
    Case(what="AdamW, small micro-batches", student=WIDE, teacher=SMALL),
    Case(what="AdamW, one micro-batch of a step", student=WIDE, teacher=SMALL, settings=LONG),
    Case(
        what="the same, gradient checkpointing",
        student=WIDE,
        teacher=SMALL,
        settings={**LONG, "student.gradient_checkpointing": True},
    ),
    Case(what="many layers", student={**SMALL, "layers": 12}, teacher=SMALL, settings=LONG),
    Case(what="Muon", student=WIDE, teacher=SMALL, settings={"optimizer.name": "muon"}),
    Case(what="LoRA", student={**WIDE, "layers": 6}, teacher=SMALL, settings={"student.lora.rank": 16}),
    Case(what="a teacher eight times as large", student=SMALL, teacher={**WIDE, "layers": 12}),
    Case(what="large vocabulary", student={**SMALL, "tokens": 32768}, teacher={**SMALL, "tokens": 32768}),
    Case(
        what="large vocabulary, loss_memory=minimal",
        student={**SMALL, "tokens": 32768},
        teacher={**SMALL, "tokens": 32768},
        settings={"train.loss_memory": "minimal"},
    ),
    Case(what="autocast", student=WIDE, teacher=SMALL, settings={**LONG, "train.autocast": "bfloat16"}),
    Case(what="Llama", student={**WIDE, "architecture": "llama"}, teacher=SMALL, settings=LONG),
    Case(
        what="long answers, sampled at once",
        student={**SMALL, "kv_heads": 4},
        teacher=SMALL,
        settings={"rollout.max_new_tokens": 240, "train.tokens_per_microbatch": 256},
    ),
)
TINY = Case(
    what="baseline",
    student={"hidden": 16, "layers": 1, "tokens": 64},
    teacher={"hidden": 16, "layers": 1, "tokens": 64},
)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the recipes, from 0")
    parser.add_argument(
        "--default-allocator", action="store_true", help="let glibc keep what was freed; writes no page"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker is not None:
        return _work(json.loads(args.worker.read_text("utf-8")))
    if args.default_allocator:
        RETURN_MEMORY.clear()
    chosen = CASES if args.only is None else [CASES[number] for number in args.only]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base = _measure(TINY, Path(folder))["peak"]
        for case in chosen:
            found = _measure(case, Path(folder))
            rows.append((case.what, found["phase"], found["estimate"], found["peak"] - base, found["parts"]))
            print(_row(rows[-1]), {k: round(v / MIB) for k, v in found["parts"].items()}, flush=True)
    page = _page(rows, base)
    print(page)
    if args.only is None and not args.default_allocator:
        (args.results / "memory.md").write_text(page, encoding="utf-8")
    return 0


def _measure(case: Case, folder: Path) -> dict[str, Any]:
    """Estimate and peak of one recipe, in bytes. Models are made in a process of their own too."""
    job = {
        "folder": str(folder),
        "student": dict(case.student),
        "teacher": dict(case.teacher),
        "settings": dict(case.settings),
    }
    found: dict[str, Any] = {}
    for task in ("make", "train"):
        file = folder / "job.json"
        file.write_text(json.dumps({**job, "task": task}), "utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks", "memory", "--worker", str(file)],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env={**os.environ, **ONE_THREAD, **RETURN_MEMORY},
        )
        if done.returncode:
            raise RuntimeError(f"{case.what}: {done.stdout}{done.stderr}")
        found = json.loads(done.stdout.splitlines()[-1])
    return found


def _work(job: Mapping[str, Any]) -> int:
    folder = Path(job["folder"])
    print(json.dumps(_make(job, folder) if job["task"] == "make" else _train(job, folder)))
    return 0


def _make(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Two random models over one vocabulary of words, and prompts of equal length."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from opd.testing import save_model, tiny_causal_lm

    count = job["student"]["tokens"]
    words = {"<eos>": 0, "<pad>": 1, **{f"w{i}": i for i in range(2, count)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    for seed, name in enumerate(("student", "teacher")):
        sizes = {key: value for key, value in job[name].items() if key != "tokens"}
        save_model(tiny_causal_lm(tokenizer, seed=seed, **sizes), tokenizer, folder / name)
    draw = random.Random(0)
    rows = [{"prompt": " ".join(f"w{draw.randrange(2, count)}" for _ in range(PROMPT_TOKENS))} for _ in range(64)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {}


def _train(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    import resource

    from opd.config.recipe import build
    from opd.config.words import merge
    from opd.doctor.memory import estimate
    from opd.doctor.model_shape import model_shape
    from opd.trainer.run import train

    dotted = {
        "student.model": str(folder / "student"),
        "teacher.model": str(folder / "teacher"),
        "prompts.path": str(folder / "prompts.jsonl"),
        "rollout.max_new_tokens": 48,
        "train.steps": STEPS,
        "train.prompts_per_step": 8,
        "train.samples_per_prompt": 4,
        "train.tokens_per_microbatch": 512,
        "eval.every": 0,
        "checkpoint.every": 0,
        "log.progress": "off",
        "run_dir": str(folder / "run"),
        **job["settings"],
    }
    config = build(merge({}, dotted))
    shapes = {name: model_shape(str(folder / name), name) for name in ("student", "teacher")}
    memory = estimate(config, shapes, PROMPT_TOKENS)["cpu"]
    train(config, overwrite=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
    parts = {**memory.always, **memory.phases[memory.phase]}
    return {"peak": peak, "estimate": memory.peak, "phase": memory.phase, "parts": parts}


def _row(row: tuple[str, str, int, int, Any]) -> list[str]:
    what, phase, estimated, measured, _ = row
    return [what, phase, f"{estimated / MIB:.0f}", f"{measured / MIB:.0f}", f"{estimated / measured - 1:+.0%}"]


def _page(rows: Sequence[tuple[str, str, int, int, Any]], base: int) -> str:
    inside = sum(abs(estimated / measured - 1) <= GOAL for _, _, estimated, measured, _ in rows)
    table = markdown.table(
        ["recipe", "largest phase", "estimate, MiB", "measured, MiB", "difference"], [_row(row) for row in rows]
    )
    return (
        "# Memory: estimated and measured\n\n"
        f"`python -m benchmarks memory`, {platform.machine()}, one thread, CPU. Peak resident memory of a process that trains the recipe for "
        f"{STEPS} steps, less the {base / MIB:.0f} MiB of a process that trains a model of a few kilobytes. The allocator gives freed memory "
        "back at once; with glibc's defaults (--default-allocator) a process keeps gaps, which the estimate leaves out and which can be "
        f"larger than all the rest where sequences grow token by token. {inside} of {len(rows)} estimates are within {GOAL:.0%}.\n\n{table}\n"
    )

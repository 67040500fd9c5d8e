"""One setting: a recipe, `opd train`, and what the run recorded."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml

from benchmarks import ROOT
from benchmarks.real import plan
from benchmarks.real.store import RESULTS, SETTING, Row, Setting
from benchmarks.real.words import CELLS
from benchmarks.real.world import accuracy, make_base, seed_folder, work

LONGEST_S = 3 * 3600
SAMPLES_KEPT = 2
EVALUATED = 256
HELD_OUT_METRICS = ("reverse_kl", "forward_kl", "accuracy")


def recipe(setting: Setting) -> dict[str, Any]:
    """What a user would write for this arm."""
    cell = CELLS[setting.cell]
    folder, arm = seed_folder(cell, setting.seed), plan.ARMS[setting.arm]
    teacher = {} if arm.reinforced else {"teacher": {"model": str(folder / setting.teacher)}}
    student: dict[str, Any] = {"model": str(folder / "base")}
    if setting.weights != "full":
        student["lora"] = {"rank": int(setting.weights.removeprefix("lora"))}
    optimizer: dict[str, Any] = {"name": setting.optimizer, "lr": setting.lr, "warmup_steps": plan.WARM_UP}
    if setting.optimizer == "natural_gradient":
        optimizer = {"name": setting.optimizer, "natural_gradient": {"trust_region": setting.lr}}
    return {
        "student": student,
        **teacher,
        "prompts": {"path": str(folder / "train.jsonl"), "eval_path": str(folder / "eval.jsonl")},
        "rollout": {"max_new_tokens": cell.words + 3},
        "train": {"steps": setting.steps, **plan.batch(arm)},
        "optimizer": optimizer,
        "eval": {"every": setting.steps if setting.measured else 0, "prompts": EVALUATED},
        "checkpoint": {"every": 0},
        "log": {"reward": True, "progress": "plain", "samples": SAMPLES_KEPT, "samples_every": setting.steps},
        "seed": setting.seed,
        **arm.recipe,
    }


def perform(setting: Setting) -> Row:
    """Train, measure, and keep a teacher where this run makes one. Raises RuntimeError with the end of the log where the run fails."""
    torch.set_num_threads(1)
    cell = CELLS[setting.cell]
    seed = seed_folder(cell, setting.seed)
    base = make_base(cell, setting.seed)
    folder = work() / "runs" / setting.name
    shutil.rmtree(folder, ignore_errors=True)
    seconds = train(recipe(setting), folder)
    student = folder / "student"
    final = accuracy(student, cell)
    if plan.teaches(setting):
        target = seed / setting.name
        shutil.rmtree(target, ignore_errors=True)
        student.rename(target)
    results = {
        "base_accuracy": _kept(base, cell.name),
        "teacher_accuracy": _kept(seed / setting.teacher, cell.name) if setting.teacher else f"{final:.5f}",
        "final_accuracy": f"{final:.5f}",
        **summary(folder),
        "cpu_seconds": f"{seconds:.1f}",
    }
    for large in ("student", "checkpoints"):
        shutil.rmtree(folder / large, ignore_errors=True)
    assert set(results) == set(RESULTS), set(results) ^ set(RESULTS)
    return Row(dict(zip(SETTING, setting.key, strict=True)) | results)


def train(values: Mapping[str, Any], folder: Path) -> float:
    """`opd train` of the recipe in a process of its own with one thread; its CPU seconds."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump({**values, "run_dir": str(folder)}, sort_keys=False), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "opd", "train", str(path), "--overwrite"],
        env=environment, capture_output=True, text=True, timeout=LONGEST_S,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(
            f"opd train {path} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def summary(folder: Path) -> dict[str, str]:
    """Of a run's metrics: series by update, and means of a step."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record["metrics"] for record in records if record["kind"] == "step"]

    def series(name: str) -> str:
        return " ".join(f"{step[name]:.4g}" for step in steps if name in step)

    def mean(name: str) -> str:
        return f"{fmean(step[name] for step in steps):.3f}"

    last = [r for r in records if r["kind"] == "eval" and r["who"] == "student"][-1:]
    held_out = {f"eval_{n}": f"{last[0]['metrics'][n]:.5f}" if last else "" for n in HELD_OUT_METRICS}
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return {
        "rewards": series("reward/mean"),
        "reverse_kl": series("reverse_kl"),
        "forward_kl": series("forward_kl"),
        "entropy": series("student_entropy"),
        "length": series("response_length"),
        "tokens": f"{sum(step['tokens'] for step in steps):.0f}",
        "rollout_seconds": mean("time/rollout"),
        "teacher_seconds": mean("time/teacher"),
        "update_seconds": mean("time/update"),
        "peak_gib": f"{peak:.2f}",
        **held_out,
    }


def _kept(folder: Path, cell: str) -> str:
    """The exact accuracy of a model that does not change, measured once."""
    kept = folder / "accuracy.txt"
    if not kept.exists():
        kept.write_text(f"{accuracy(folder, CELLS[cell]):.5f}")
    return kept.read_text()

"""One setting: the quantised student, `opd.Distiller`, and what the rounded weights are worth."""

from __future__ import annotations

import gc
import resource
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import opd
from benchmarks.real import chat
from benchmarks.real.compression import plan
from benchmarks.real.compression.measure import measured, prose
from benchmarks.real.compression.plan import Setting
from benchmarks.real.compression.quantise import fake_quantise, rounded
from benchmarks.real.store import Row
from benchmarks.real.world import load, work

MEASURED = 64
"""Prompts, of tuning or held out."""
SAME = 1e-4
"""Largest difference of a logit between the fake-quantised model and the rounded one: both multiply with the same weights."""


def perform(setting: Setting, model: Path) -> Row:
    """Quantise, train and measure the model in that folder."""
    torch.set_num_threads(1)
    began = time.process_time()
    tokenizer, teacher = load(model)
    found: dict[str, Any] = {"training_reverse_kl": "", "teacher_tokens": 0}
    if setting.arm == "untrained":
        student: Any = start(setting.weights, model)
    else:
        student, told = train(setting, model, tokenizer, teacher)
        found |= told
    student = finished(setting.weights, student, tokenizer)
    gc.collect()
    found |= measured(
        student,
        tokenizer,
        teacher,
        _chats(chat.tuning()[:MEASURED] if setting.part == "tuning" else chat.held_out(MEASURED)),
        setting.tokens,
    )
    found["cpu_seconds"] = f"{time.process_time() - began:.1f}"
    found["peak_gib"] = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f}"
    assert set(found) == set(plan.RESULTS), set(found) ^ set(plan.RESULTS)
    return Row(dict(zip(plan.SETTING, setting.key, strict=True)) | {name: str(value) for name, value in found.items()})


def start(weights: str, model: Path) -> Any:
    """The model before training, as a Distiller takes it: an object, or the section of a recipe."""
    if weights == plan.NF4:
        options = {"quantization": "bitsandbytes-4bit"}
        return {"model": str(model), "load_options": options, "lora": {"rank": 16}}
    student = load(model)[1]
    if weights == plan.INT4:
        fake_quantise(student)
    return student


def train(setting: Setting, model: Path, tokenizer: Any, teacher: Any) -> tuple[Any, dict[str, Any]]:
    """The trained student, and what the run recorded."""
    student, arm = start(setting.weights, model), plan.ARMS[setting.arm]
    folder = work() / "compression" / setting.name
    run = opd.Distiller(
        student=student if setting.weights == plan.NF4 else (student, tokenizer),
        teacher=(teacher, tokenizer),
        prompts=_chats(chat.training()),
        objective=arm.sections["objective"],
        rollout={"max_new_tokens": setting.tokens, **arm.sections["rollout"]},
        train={"steps": setting.steps, "prompts_per_step": setting.prompts, "samples_per_prompt": 1},
        optimizer={"lr": setting.lr, "schedule": "cosine"},
        eval={"every": 0},
        checkpoint={"every": 0},
        log={"progress": "off", "samples": 0},
        run_dir=folder,
        seed=setting.seed,
    ).train(overwrite=True)
    steps = [record.metrics for record in run.metrics if record.kind == "step"]
    shutil.rmtree(folder)
    return run.student, {
        "training_reverse_kl": " ".join(f"{step['reverse_kl']:.4g}" for step in steps),
        "teacher_tokens": round(sum(step["tokens"] for step in steps)),
    }


def finished(weights: str, student: Any, tokenizer: Any) -> Any:
    """What would be shipped of a trained student: the rounded weights, which compute what training saw."""
    if weights != plan.INT4:  # of adapters on NF4 the Distiller returns what both compute together
        return student
    made = rounded(student)
    ids = prose(tokenizer)[0][0][:, :64]
    with torch.no_grad():
        gap = float((student(ids).logits - made(ids).logits).abs().max())
    assert gap <= SAME, f"the rounded student is {gap} away from the one that was trained"
    return made


def _chats(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Rows that opd reads."""
    return [{"prompt": chat.messages(text)} for text in texts]

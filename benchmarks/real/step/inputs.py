"""The student and the prompts, made once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from benchmarks.real.world import load, original, work

NOISE = 0.08  # of each matrix's standard deviation
NOISE_SEED = 0
TASKS = ("Write a short note", "Explain", "Give some advice", "Tell a short story")
TOPICS = (
    "how bread rises in a warm kitchen", "the first day at a new school", "why the sea is salty near the coast",
    "planting tomatoes on a small balcony", "what a lighthouse keeper did at night", "learning to ride a bicycle as an adult",
    "the sounds of a train station at noon", "keeping a small library in good order",
)  # fmt: skip
LISTENERS = ("a curious child", "an old friend")


def folder() -> Path:
    """Where they are kept."""
    return work() / "step"


def noisy_student() -> Path:
    """SmolLM2-135M-Instruct with Gaussian noise on every matrix."""
    made = folder() / "student"
    if made.exists():
        return made
    tokenizer, model = load(original())
    generator = torch.Generator().manual_seed(NOISE_SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise, alpha=NOISE * float(parameter.std()))
    part = folder() / "student.part"
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(made)
    return made


def write_prompts(path: Path, prompts: int, steps: int) -> None:
    """`steps` times the same prompts, so that no step starts a new pass over the file in its middle."""
    questions = [
        f"{task} for {listener} about {topic}, in plain words."
        for topic in TOPICS
        for listener in LISTENERS
        for task in TASKS
    ]
    if prompts > len(questions):
        raise SystemExit(f"There are {len(questions)} prompts, and --prompts {prompts} asks for more.")
    rows = [json.dumps({"prompt": [{"role": "user", "content": question}]}) for question in questions[:prompts]]
    path.write_text("\n".join(rows * steps) + "\n", encoding="utf-8")

"""A small world on disk: student, teacher, prompts, and the settings of a run that takes a second or two."""

from __future__ import annotations

import json
from pathlib import Path

from opd.testing import digit_tokenizer, save_model, tiny_causal_lm
from opd.types import Prompt


def make_world(folder: Path) -> Path:
    """Student and teacher folders, and prompts.jsonl with 40 rows."""
    tokenizer = digit_tokenizer()
    for name, seed in (("student", 1), ("teacher", 2)):
        model = tiny_causal_lm(tokenizer, hidden=32, layers=1, max_positions=64, seed=seed, initializer_range=0.4)
        save_model(model, tokenizer, folder / name)
    rows = [{"prompt": f"{i * 7919 % 10_000}>", "answer": str(i), "response": f"{i}"} for i in range(40)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(world: Path, run_dir: Path, **more: object) -> dict[str, object]:
    """Dotted settings of a quick run; `more` uses __ for the dots."""
    base: dict[str, object] = {
        "student.model": str(world / "student"),
        "teacher.model": str(world / "teacher"),
        "prompts.path": str(world / "prompts.jsonl"),
        "prompts.eval_path": str(world / "prompts.jsonl"),
        "rollout.max_new_tokens": 6,
        "train.steps": 8,
        "train.prompts_per_step": 6,
        "train.samples_per_prompt": 2,
        "train.tokens_per_microbatch": 60,
        "optimizer.lr": 3e-3,
        "optimizer.warmup_steps": 2,
        "eval.every": 3,
        "eval.prompts": 8,
        "checkpoint.every": 2,
        "log.progress": "off",
        "log.samples_every": 2,
        "run_dir": str(run_dir),
    }
    return base | {key.replace("__", "."): value for key, value in more.items()}


def first_digit(prompt: Prompt, response: str) -> float:
    """A reward that random models get, and that differs from prompt to prompt."""
    return float(response[0]) / 10 if response[:1].isdigit() else 0.0

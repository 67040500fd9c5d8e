"""The task of sorting eight digits: verifiable, learnable in seconds, and easy to teach wrongly."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

DIGITS = 8
SEPARATOR = ">"
WRONG = (0.13, 0.13, 0.26, 0.26, 0.39, 0.39, 0.52, 0.52, 0.78, 0.78)
"""Probability of a wrong digit in the student's corpus, by the correct digit. Large enough that the base model's most likely
answer is often wrong too, so that distilling it does more than lower a temperature."""


def draw(generator: random.Random) -> tuple[str, str]:
    """A prompt such as '31415926>' and its answer '11234569'."""
    digits = [generator.randrange(10) for _ in range(DIGITS)]
    return "".join(map(str, digits)) + SEPARATOR, "".join(map(str, sorted(digits)))


def spoil(answer: str, generator: random.Random, wrong: Sequence[float] = WRONG) -> str:
    """The answer with each digit d replaced by another one with probability wrong[d]."""
    return "".join(_other(d, generator) if generator.random() < wrong[int(d)] else d for d in answer)


def _other(digit: str, generator: random.Random) -> str:
    return str((int(digit) + generator.randrange(1, 10)) % 10)


def write_prompts(path: Path, count: int, *, seed: int) -> None:
    """Write a JSONL file with the columns `prompt` and `answer`."""
    generator = random.Random(seed)
    rows = (draw(generator) for _ in range(count))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in rows))

"""The distance of a student from its teacher on chat prompts, and how well it predicts text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import opd
from benchmarks.real.compression.plan import PER_PROMPT

PROSE = Path(__file__).with_name("prose.txt")
"""Paragraphs of this repository's documentation, kept so that they stay as they were measured."""
WINDOWS, WINDOW = 4, 512
"""Of the prose: how many there are, and tokens of each."""

Text = tuple[Tensor, int]
"""Token ids [1, tokens], and how many at the start are given."""


def measured(student: Any, tokenizer: Any, teacher: Any, rows: Sequence[dict[str, Any]], tokens: int) -> dict[str, str]:
    """The student is a model, or the section of a recipe. KL per prompt, in nats per token, at tokens that the student draws; and nats per token of prose and of the teacher's own answers.
    Every model draws by the same random numbers."""
    distiller = opd.Distiller(
        student=student if isinstance(student, dict) else (student, tokenizer),
        teacher=(teacher, tokenizer),
        prompts=rows,
        eval_prompts=rows,
        reward=lambda _prompt, _response: 0.0,
        rollout={"max_new_tokens": tokens},
        seed=0,
    )
    parts = distiller.components
    model = parts.student.model
    parts.student_sampler.load(parts.student)
    per_prompt = parts.evaluate("student", extra=False).per_prompt
    assert parts.evaluator is not None and parts.teacher_sampler is not None
    answers = parts.teacher_sampler.sample(parts.evaluator.prompts, seed=0)
    texts = [(torch.tensor([[*a.prompt_ids, *a.response_ids]]), len(a.prompt_ids)) for a in answers]
    return {
        **{name: " ".join(f"{value:.4g}" for value in per_prompt[name]) for name in PER_PROMPT},
        "prose_nats": f"{nats(model, prose(tokenizer)):.5f}",
        "teacher_text_nats": f"{nats(model, texts):.5f}",
    }


def prose(tokenizer: Any) -> list[Text]:
    """The first windows of PROSE."""
    ids = tokenizer(PROSE.read_text(encoding="utf-8"), add_special_tokens=False).input_ids[: WINDOWS * WINDOW]
    return [(torch.tensor([ids[start : start + WINDOW]]), 1) for start in range(0, len(ids), WINDOW)]


@torch.no_grad()
def nats(model: Any, texts: Iterable[Text]) -> float:
    """Mean of −log p over all tokens that are not given."""
    total, count = 0.0, 0
    for ids, given in texts:
        logp = model(input_ids=ids).logits[0, given - 1 : -1].float().log_softmax(-1)
        total -= float(logp.gather(-1, ids[0, given:, None]).sum())
        count += ids.shape[1] - given
    return total / count

"""Pairs of real models whose next-token probabilities are written down in a table, so that a pencil knows what the doctor should say.

The task: the prompt is a letter, its answer the digit of the same place ("c" → "2"), then an end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from opd.config import Config
from opd.config.recipe import build, merge
from opd.doctor.check import Check
from opd.testing import digit_tokenizer, save_model, tiny_causal_lm

LETTERS = "abcdefghij"
TOKENIZER = digit_tokenizer(extra=LETTERS)
SIZE = len(TOKENIZER)
EOS = TOKENIZER.eos_token_id
SECOND_END = TOKENIZER.convert_tokens_to_ids(">")
WIDTH = 32


def bigram_lm(table: torch.Tensor) -> PreTrainedModel:
    """A model that gives token j after token i the probability table[i, j], whatever came before: the attention and the feed-forward
    layers add nothing, and the output layer reads the last token off the embedding."""
    model: Any = tiny_causal_lm(TOKENIZER, layers=1, hidden=WIDTH, max_positions=64, tie=False)
    layer = model.model.layers[0]
    with torch.no_grad():
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            part.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(SIZE, WIDTH))
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :SIZE] = table.log().clamp(min=-20).T / math.sqrt(
            WIDTH
        )  # RMSNorm makes a one-hot √WIDTH long
    return model


def answering(right: float = 0.95, ends: Mapping[int, float] | None = None, spread: float = 0.02) -> torch.Tensor:
    """A letter is followed by its digit with probability `right`, otherwise by another digit; a digit by each id of `ends` with its
    probability. `spread` of every row goes to all tokens alike."""
    ends = {EOS: 1.0} if ends is None else ends
    table = torch.zeros(SIZE, SIZE)
    digits = [TOKENIZER.convert_tokens_to_ids(str(d)) for d in range(10)]
    table[:, EOS] = 1.0
    for place, letter in enumerate(LETTERS):
        row = table[TOKENIZER.convert_tokens_to_ids(letter)]
        row.zero_()
        row[digits] = (1 - right) / 9
        row[digits[place]] = right
    for digit in digits:
        row = table[digit]
        row.zero_()
        for token, share in ends.items():
            row[token] = share
        row[digits[0]] += 1 - sum(ends.values())
    return (1 - spread) * table + spread / SIZE


def write_pair(
    folder: Path, student: PreTrainedModel | torch.Tensor, teacher: PreTrainedModel | torch.Tensor, **more: Any
) -> dict[str, Any]:
    """Both models on disk, forty prompts, and the settings of a run; `more` uses __ for the dots."""
    for name, one in (("student", student), ("teacher", teacher)):
        save_model(bigram_lm(one) if isinstance(one, torch.Tensor) else one, TOKENIZER, folder / name)
    rows = [{"prompt": LETTERS[i % 10], "answer": str(i % 10)} for i in range(40)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {
        "student.model": str(folder / "student"),
        "teacher.model": str(folder / "teacher"),
        "prompts.path": str(folder / "prompts.jsonl"),
        "rollout.max_new_tokens": 6,
        "train.prompts_per_step": 8,
        "train.samples_per_prompt": 2,
        "eval.every": 0,
        "log.progress": "off",
        "run_dir": str(folder / "run"),
    }
    return values | {key.replace("__", "."): value for key, value in more.items()}


def config_of(values: Mapping[str, Any]) -> Config:
    return build(merge({}, values))


def by_name(checks: list[Check]) -> dict[str, Check]:
    found = {check.name: check for check in checks}
    assert len(found) == len(checks), "two checks have one name"
    return found


def verdicts(checks: list[Check]) -> dict[str, str]:
    return {name: check.verdict for name, check in by_name(checks).items()}

"""Tiny models, a tiny data set, a trivial reward: what a real run of verl needs."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from opd.losses import Objective
from opd.testing import CHAT_TEMPLATE, byte_tokenizer, save_model, tiny_causal_lm

REWARD = '''"""The share of digits in a response."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return sum(c.isdigit() for c in solution_str) / max(1, len(solution_str))
'''


def section(**keys: Any) -> dict[str, Any]:
    """The tree of an `opd:` section: `rl_weight` is rl.weight, `mixture_kind` is mixture.kind, and a key of the objective stands alone."""
    tree: dict[str, Any] = {}
    objective = {item.name for item in fields(Objective)}
    for key, value in keys.items():
        group, _, name = key.partition("_")
        if key in objective:
            group, name = "objective", key
        elif key == "teacher_column":
            group, name = "prompts", key
        elif group not in ("rl", "mixture"):
            tree[key] = value
            continue
        tree.setdefault(group, {})[name] = value
    return tree


def make_models(folder: Path) -> Path:
    """Llamas on a byte tokenizer, whose distributions are far from uniform and from each other; `padded` and `wide` have rows to spare."""
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    for name, seed, tie, rows in (
        ("student", 0, False, None),
        ("teacher", 1, False, None),
        ("tied", 2, True, None),
        ("padded", 3, False, 300),
        ("wide", 4, False, 320),
    ):
        model = tiny_causal_lm(
            tokenizer, architecture="llama", seed=seed, initializer_range=0.2, tie=tie, vocab_size=rows
        )
        save_model(model, tokenizer, folder / name)
    return folder


def make_near_pair(folder: Path) -> Path:
    """`student`, and a `teacher` that is near it: the doctor finds nothing wrong with them, in a context of 16384 tokens."""
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    model = tiny_causal_lm(
        tokenizer, architecture="llama", seed=0, initializer_range=0.2, vocab_size=300, max_positions=16384
    )
    save_model(model, tokenizer, folder / "student")
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.add_(0.1 * weight.std() * torch.randn_like(weight))
    save_model(model, tokenizer, folder / "teacher")
    return folder


def make_prompts(path: Path, rows: int = 32) -> Path:
    """A parquet file in verl's form."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = [
        {
            "data_source": "toy",
            "prompt": [{"role": "user", "content": f"{i}+{i + 1}="}],
            "reward_model": {"style": "rule", "ground_truth": str(2 * i + 1)},
            "extra_info": {"index": i},
        }
        for i in range(rows)
    ]
    pq.write_table(pa.Table.from_pylist(table), path)
    return path


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of verl's file logger, one per step."""
    return [json.loads(line)["data"] for line in path.read_text(encoding="utf-8").splitlines()]

"""The base of a seed, and the exact probability of a right answer under any model."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tools.smollm2 import default_folder, is_ready, make_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import ROOT
from benchmarks.real.words import HELD_OUT, HELD_OUT_SEED, TRAINING, Cell, rows, write_prompts

BATCH, WARM_UP = 24, 10
"""Of the supervised steps: rows, and steps of AdamW's warm-up."""
AT_ONCE = 64


def work() -> Path:
    """Where models and runs are while they are needed: $OPD_REAL, or runs/real."""
    return Path(os.environ.get("OPD_REAL") or ROOT / "runs" / "real")


def original() -> Path:
    """SmolLM2-135M-Instruct, fetched on first use; or the folder $OPD_REAL_MODEL, with which the code can be tried on a tiny model."""
    if other := os.environ.get("OPD_REAL_MODEL"):
        return Path(other)
    folder = default_folder()
    if not is_ready(folder):
        make_folder(folder)
    return folder


def seed_folder(cell: Cell, seed: int) -> Path:
    """Holds base, teacher (once there is one) and train.jsonl of a seed."""
    return work() / f"{cell.name}-{seed}"


def make_base(cell: Cell, seed: int) -> Path:
    """The model after `cell.warm_steps` supervised steps on rows of this seed, and the seed's prompts."""
    folder = seed_folder(cell, seed)
    base = folder / "base"
    if base.exists():
        return base
    folder.mkdir(parents=True, exist_ok=True)
    write_prompts(folder / "train.jsonl", TRAINING, cell.words, 1000 + seed)
    write_prompts(folder / "eval.jsonl", HELD_OUT, cell.words, HELD_OUT_SEED)
    tokenizer, model = load(original())
    examples = list(rows(BATCH * cell.warm_steps, cell.words, 2_000_000 + seed))
    groups = (examples[start : start + BATCH] for start in range(0, len(examples), BATCH))
    supervised(model, ([_tensors(tokenizer, group)] for group in groups), cell.warm_rate)
    save(tokenizer, model, base)
    del model
    gc.collect()  # a model is a cycle of references, and its memory is needed by the run
    return base


Part = tuple[torch.Tensor, torch.Tensor]
"""Ids and wanted ids of some rows, as `padded` makes them."""


def supervised(model: Any, batches: Iterable[Sequence[Part]], rate: float, warm_up: int = WARM_UP) -> None:
    """AdamW on the cross-entropy of the wanted tokens, one step per batch; the parts of a batch have the same weight."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step, parts in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / warm_up)
        for ids, wanted in parts:
            (model(input_ids=ids, labels=wanted).loss / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def save(tokenizer: Any, model: Any, folder: Path) -> None:
    """Into a folder that is there only once it is whole."""
    made = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(made, ignore_errors=True)
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    made.rename(folder)


def load(folder: Path) -> tuple[Any, Any]:
    """Tokenizer and float32 model."""
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def accuracy(folder: Path, cell: Cell) -> float:
    """The mean over the held-out prompts of the probability that a sample at temperature 1 is the answer with its end: no sampling noise.
    Of the token sequences that decode to the answer it counts the tokenizer's own."""
    tokenizer, model = load(folder)
    held_out = list(rows(HELD_OUT, cell.words, HELD_OUT_SEED))
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(held_out), AT_ONCE):
            ids, wanted = _tensors(tokenizer, held_out[start : start + AT_ONCE])
            logp = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
            kept = wanted[:, 1:] >= 0
            given = logp.gather(-1, wanted[:, 1:].clamp(min=0)[..., None])[..., 0]
            total += float((given * kept).sum(1).exp().sum())
    del model
    gc.collect()
    return total / len(held_out)


Pair = tuple[list[int], list[int]]
"""Token ids of a prompt, and of its answer."""


def token_pairs(tokenizer: Any, examples: Sequence[tuple[str, str]]) -> list[Pair]:
    """Token ids of prompts as they are, and of answers with their ends."""
    pairs = [
        (tokenizer(prompt, add_special_tokens=False).input_ids, tokenizer(answer, add_special_tokens=False).input_ids)
        for prompt, answer in examples
    ]
    return [(prompt, [*answer, tokenizer.eos_token_id]) for prompt, answer in pairs]


def padded(pairs: Sequence[Pair], fill: int) -> Part:
    """Token ids of prompts and answers, padded on the right, and the same with −100 for everything but answers."""
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.full((len(pairs), longest), fill)
    wanted = torch.full((len(pairs), longest), -100)
    for row, (prompt, answer) in enumerate(pairs):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        wanted[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, wanted


def _tensors(tokenizer: Any, examples: Sequence[tuple[str, str]]) -> Part:
    return padded(token_pairs(tokenizer, examples), tokenizer.eos_token_id)

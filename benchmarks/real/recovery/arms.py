"""The arms: recipes of `opd train`, and plain supervised loops for what it does not offer."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.real import chat, world
from benchmarks.real.recovery.plan import ARMS, CHAT, DAMAGE, SKILL, WARM_UP, Setting
from benchmarks.real.words import rows

Answer = tuple[list[int], list[int]]


def prepare(seed: int) -> Path:
    """A folder with what the arms of a seed begin with, and what recipes/smollm2/recovery.yaml names: `base`, the damaged model; `original`,
    a link; chat.jsonl; both.jsonl, which adds rows of the skill, and in which each row names its teacher; held_out.jsonl."""
    folder = world.make_base(DAMAGE, seed).parent
    link = folder / "original"
    if not link.is_symlink():
        link.symlink_to(world.original().resolve())
    texts = chat.training()
    chat.write(folder / "held_out.jsonl", chat.held_out())
    chat.write(folder / "chat.jsonl", texts)
    chat.write(folder / "both.jsonl", texts, teacher="chat")
    skill = [
        json.dumps({"prompt": prompt, "teacher": "skill"})
        for prompt, _ in rows(len(texts) * SKILL // CHAT, DAMAGE.words, 1000 + seed)
    ]
    with (folder / "both.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n".join(skill) + "\n")
    return folder


def recipe(setting: Setting) -> dict[str, Any]:
    """What a user would write for this arm."""
    folder, arm = world.seed_folder(DAMAGE, setting.seed), ARMS[setting.arm]
    damaged, original = str(folder / "base"), str(world.original())
    teacher: Mapping[str, Any] = {"teacher": {"model": original}}
    if arm.skill:
        teacher = {"teachers": {"chat": {"model": original}, "skill": {"model": damaged}}}
    return {
        "student": {"model": damaged},
        **teacher,
        "prompts": {"path": str(folder / ("both.jsonl" if arm.skill else "chat.jsonl"))},
        "train": {
            "steps": setting.steps,
            "prompts_per_step": setting.chat + setting.skill_rows,
            "samples_per_prompt": 1,
        },
        "optimizer": {"lr": setting.lr, "warmup_steps": WARM_UP},
        "eval": {"every": 0},
        "checkpoint": {"every": 0},
        "log": {"progress": "plain", "samples": 4, "samples_every": max(1, setting.steps // 2)},
        "seed": setting.seed,
        **arm.recipe,
        "rollout": {"max_new_tokens": setting.tokens, **arm.recipe.get("rollout", {})},
    }


def train_plainly(setting: Setting, student: Path) -> int:
    """The supervised loop of this arm, from the damaged model to the folder `student`; the number of the original's tokens."""
    base = world.seed_folder(DAMAGE, setting.seed) / "base"
    tokenizer, teacher = world.load(world.original())
    _, model = world.load(base)
    seen = 0

    def batches() -> Iterator[list[world.Part]]:
        nonlocal seen
        skill = list(rows(setting.skill_rows * setting.steps, DAMAGE.words, 3_000_000 + setting.seed))
        for step, texts in enumerate(_prompts(setting)):
            drawn = answers(tokenizer, teacher, texts, setting.tokens, seed=1_000_003 * setting.seed + step)
            seen += sum(len(answer) for _, answer in drawn)
            parts = [drawn]
            if count := setting.skill_rows:
                parts.append(world.token_pairs(tokenizer, skill[count * step : count * (step + 1)]))
            yield [world.padded(part, tokenizer.eos_token_id) for part in parts]

    world.supervised(model, batches(), setting.lr, WARM_UP)
    world.save(tokenizer, model, student)
    return seen


def _prompts(setting: Setting) -> Iterator[list[str]]:
    """The chat prompts of every step: a new order every time that all of them were there."""
    source, left = random.Random(setting.seed), list[str]()
    for _ in range(setting.steps):
        if len(left) < setting.chat:
            left += random.Random(source.random()).sample(chat.training(), len(chat.training()))
        yield left[: setting.chat]
        del left[: setting.chat]


@torch.no_grad()
def answers(tokenizer: Any, model: Any, texts: Sequence[str], longest: int, *, seed: int) -> list[Answer]:
    """Token ids of prompts and of answers drawn at temperature 1; an answer that ended has its end."""
    prompts = [
        tokenizer.apply_chat_template(chat.messages(text), tokenize=False, add_generation_prompt=True) for text in texts
    ]
    ids = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
    widest, end = max(map(len, ids)), tokenizer.eos_token_id
    padded = torch.tensor([[end] * (widest - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (widest - len(row)) + [1] * len(row) for row in ids])
    torch.manual_seed(seed)
    drawn = model.generate(
        input_ids=padded, attention_mask=mask, max_new_tokens=longest, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        eos_token_id=end, pad_token_id=end,
    )[:, widest:].tolist()  # fmt: skip
    return [(prompt, _until(answer, end)) for prompt, answer in zip(ids, drawn, strict=True)]


def _until(answer: list[int], end: int) -> list[int]:
    return answer[: answer.index(end) + 1] if end in answer else answer

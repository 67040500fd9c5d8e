"""Models that vLLM can serve on a CPU (head_dim ≥ 32), with padding rows, and recipes that take seconds."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from opd.config import Config
from opd.config.recipe import build, merge
from opd.data.pack import layout_sequences
from opd.models import response_logits
from opd.samplers.base import Sampling
from opd.testing import byte_tokenizer, save_model, tiny_causal_lm
from opd.types import Prompt, Rollout

TOKENIZER = byte_tokenizer()
TOKENS, ROWS = 258, 300
EOS = TOKENIZER.eos_token_id
PROMPTS = [Prompt(index=i, text=text) for i, text in enumerate(("12+7=", "a", "the quick brown", "x" * 30))]


def model(seed: int = 1, **more: Any) -> PreTrainedModel:
    sizes = {"hidden": 128, "heads": 4, "kv_heads": 2, "layers": 2, "max_positions": 128, "initializer_range": 0.15}
    return tiny_causal_lm(TOKENIZER, architecture="llama", vocab_size=ROWS, seed=seed, **(sizes | more))


def make_world(folder: Path) -> Path:
    for name, seed in (("student", 1), ("teacher", 2)):
        save_model(model(seed), TOKENIZER, folder / name)
    save_model(model(3, tie=False), TOKENIZER, folder / "untied")
    rows = [{"prompt": f"{i * 7919 % 1000}>", "answer": str(i)} for i in range(24)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(world: Path, run_dir: Path, **more: object) -> Config:
    """A run of a few steps with vLLM; `more` uses __ for the dots."""
    base: dict[str, object] = {
        "student.model": str(world / "student"),
        "teacher.model": str(world / "teacher"),
        "prompts.path": str(world / "prompts.jsonl"),
        "prompts.eval_path": str(world / "prompts.jsonl"),
        "rollout.engine": "vllm",
        "rollout.max_new_tokens": 8,
        "rollout.batch_size": 16,
        "train.steps": 5,
        "train.prompts_per_step": 4,
        "train.samples_per_prompt": 2,
        "optimizer.lr": 3e-3,
        "optimizer.warmup_steps": 0,
        "eval.every": 0,
        "eval.prompts": 4,
        "log.progress": "plain",
        "run_dir": str(run_dir),
    }
    return build(merge({}, base | {key.replace("__", "."): value for key, value in more.items()}))


BORDER = 1e-4
"""Tokens whose place in a nucleus hangs on less than this much probability may be in it or not: two engines round apart."""


def sampler_gap(model: PreTrainedModel, rollout: Rollout, sampling: Sampling) -> float:
    """The largest difference of a rollout's log-probs from transformers', whichever side of a nucleus's border they take."""
    borders = (0.0,) if sampling.top_p == 1 else (-BORDER, 0.0, BORDER)
    theirs = torch.tensor(rollout.sampler_logp)
    ours = [own_logp(model, rollout, replace(sampling, top_p=sampling.top_p + border)) for border in borders]
    return float(torch.stack([(one - theirs).abs() for one in ours]).min(0).values.max())


@torch.no_grad()
def own_logp(model: PreTrainedModel, rollout: Rollout, sampling: Sampling) -> torch.Tensor:
    """The log-probs of a rollout by transformers: the tokens of both sides, tempered, cut to top-k and top-p."""
    sequences = layout_sequences([rollout.prompt_ids], [rollout.response_ids], layout="packed", pad_id=0)
    logits = response_logits(model, sequences)[:, :TOKENS].double() / (sampling.temperature or 1.0)
    if sampling.top_k:
        logits[logits < logits.topk(sampling.top_k).values[:, -1:]] = -torch.inf
    if sampling.top_p < 1:
        probs, order = logits.softmax(-1).sort(descending=True)
        out = (probs.cumsum(-1) - probs) >= sampling.top_p
        logits[out.gather(-1, order.argsort(-1))] = -torch.inf
    return logits.log_softmax(-1).gather(-1, torch.tensor(rollout.response_ids)[:, None])[:, 0]


def servers() -> list[psutil.Process]:
    """Processes of vLLM that this one started, or what it started, though they may have lost their parents since."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ", "name", "status"]):
        words = " ".join([process.info["name"] or "", *(process.info["cmdline"] or [])])
        ours = (process.info["environ"] or {}).get("OPD_TEST_MARK") == os.environ["OPD_TEST_MARK"]
        if ours and ("vllm" in words.lower()) and process.pid != os.getpid() and "pytest" not in words:
            found.append(process)
    return [process for process in found if process.info["status"] != psutil.STATUS_ZOMBIE]

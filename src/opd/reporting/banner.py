"""The first lines of a run: what is trained on what, from the words of its recipe, before anything heavy is loaded."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from opd.errors import printable
from opd.reporting.model_facts import ModelFacts, model_facts

Settings = Mapping[str, Any]
"""A recipe with its defaults filled in, as nested mappings."""
LABEL = 10  # characters
MAX_COUNTED = 200_000_000  # bytes of a file whose lines are counted
NARROW = 20  # characters of text below which wrapping makes nothing clearer
DIVERGENCES = {
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "generalized_jsd": "generalised JSD",
    "skew_reverse_kl": "skewed reverse KL",
    "skew_forward_kl": "skewed forward KL",
    "alpha_beta_divergence": "α-β divergence",
    "forward_reverse_kl": "forward and reverse KL",
    "total_variation": "total variation",
}


def show(lines: list[tuple[str, str]], stream: TextIO) -> None:
    """Print labelled lines: wrapped to a terminal's width, and one line each in a pipe."""
    terminal = stream.isatty()
    width = shutil.get_terminal_size((80, 24)).columns if terminal else 0
    for label, text in lines:
        start, text = f"{label:<{LABEL}}", printable(text)
        room = width - 1 if width - LABEL > NARROW else 0
        wrapped = textwrap.wrap(text, room - LABEL, break_on_hyphens=False) if room else [text]
        print(start + f"\n{' ' * LABEL}".join(wrapped or [""]), file=stream)
    stream.flush()


def banner(settings: Settings, version: str) -> list[tuple[str, str]]:
    """(label, text) of every line."""
    run_dir = str(settings.get("run_dir"))
    lines = [("opd", f"{version} · {run_dir}")]
    lines.append(("student", _student(settings["student"])))
    lines += [("teacher", text) for text in _teachers(settings)]
    lines.append(("loss", objective_words(settings)))
    lines.append(("prompts", _prompts(settings)))
    lines.append(("step", _step(settings)))
    return lines


def objective_words(settings: Settings) -> str:
    """Such as "reverse KL, whole vocabulary"."""
    objective, rl = settings.get("objective") or {}, settings.get("rl") or {}
    reward = f"reward (weight {rl.get('weight', 0):g})" if rl.get("weight") or rl.get("weight_end") else ""
    if rl.get("distill_weight", 1) == 0 and not rl.get("distill_weight_end"):
        return reward
    name = objective.get("divergence") or "reverse_kl"
    support = objective.get("support") or "full"
    estimator = objective.get("estimator") or "exact"
    beta = objective.get("beta")
    words = DIVERGENCES.get(name, name) + (f" (β = {beta:g})" if isinstance(beta, (int, float)) else "")
    over = {
        "full": "whole vocabulary",
        "sampled": f"sampled token{'' if estimator == 'exact' else f' ({estimator})'}",
        "teacher_top_k": f"the teacher's top {objective.get('top_k') or 64}",
        "student_top_k": f"the student's top {objective.get('top_k') or 64}",
        "union": f"top {objective.get('top_k') or 64} of both",
    }.get(support, support)
    return f"{words}, {over}" + (f", and {reward}" if reward else "")


def teacher_names(settings: Settings) -> list[str]:
    """The teachers as a reader knows them: models, addresses, or the student itself."""
    return [_teacher_name(section) for section in _sections(settings).values()]


def _sections(settings: Settings) -> Mapping[str, Settings]:
    one = settings.get("teacher")
    return {"": one} if one else settings.get("teachers") or {}


def _teacher_name(section: Settings) -> str:
    urls = section.get("url") or ()
    urls = (urls,) if isinstance(urls, str) else urls
    itself = {
        "ema": "the student's moving average",
        "adapter_off": "the student without its adapters",
        "student": "the student itself",
    }.get(str(section.get("source")))
    return " + ".join(map(str, urls)) or itself or str(section.get("model") or "")


def _student(section: Settings) -> str:
    facts = model_facts(str(section["model"]), section.get("revision"))
    lora = section.get("lora")
    trained = f", LoRA of rank {lora.get('rank', 32)}" if isinstance(lora, Mapping) else ""
    return _model(str(section["model"]), facts, section) + trained


def _teachers(settings: Settings) -> list[str]:
    lines = []
    for name, section in _sections(settings).items():
        facts = ModelFacts()
        if section.get("model") and not section.get("url"):
            facts = model_facts(str(section["model"]), section.get("revision"))
        lines.append((f"{name}: " if name else "") + _model(_teacher_name(section), facts, section))
    return lines or ["none: the student learns from the reward alone"]


def _model(name: str, facts: ModelFacts, section: Settings) -> str:
    known = f" · {facts}" if str(facts) else ""
    if section.get("url") or section.get("source", "model") != "model":
        return name
    dtype, device = section.get("dtype") or "auto", section.get("device") or "auto"
    used = [f"in {dtype}" if dtype not in ("auto", facts.dtype) else "", f"on {device}" if device != "auto" else ""]
    return name + known + (f" · {' '.join(word for word in used if word)}" if any(used) else "")


def _prompts(settings: Settings) -> str:
    section, evaluation = settings["prompts"], settings.get("eval") or {}
    rows = _rows(str(section["path"]), section.get("limit"))
    text = str(section["path"]) + rows
    if section.get("eval_path") and evaluation.get("every", 1):
        held_out = _rows(str(section["eval_path"]), evaluation.get("prompts"))
        text += f" · held out: {section['eval_path']}{held_out}, every {evaluation.get('every')} steps"
    return text


def _rows(path: str, limit: int | None) -> str:
    """The number of lines of a local JSONL file, as far as they are used."""
    place = Path(path)
    try:
        if place.suffix != ".jsonl" or place.stat().st_size > MAX_COUNTED:
            return ""
        with place.open("rb") as stream:
            rows = sum(bool(line.strip()) for line in stream)
    except OSError:
        return ""
    return f" ({rows:,} rows)" if limit is None or limit >= rows else f" ({limit:,} of {rows:,} rows)"


def _step(settings: Settings) -> str:
    train, rollout = settings["train"], settings["rollout"]
    prompts, samples = int(train["prompts_per_step"]), int(train["samples_per_prompt"])
    longest = int(rollout["max_new_tokens"])
    return (
        f"{prompts:,} prompts × {samples:,} samples × at most {longest:,} tokens = up to "
        f"{prompts * samples * longest:,} tokens; {int(train['steps']):,} steps"
    )

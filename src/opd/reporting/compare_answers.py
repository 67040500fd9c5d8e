"""Answers of compared runs to the same held-out prompt, for the page: tokens with their colour level, as plain data."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from opd.reporting.record import SampleRecord
from opd.reporting.runs import Group, Run
from opd.reporting.tokens import KL_EDGES, visible

MAX_PROMPTS = 24
MAX_TOKENS = 1500  # of an answer

Prompt = tuple[int | str, str]
"""Row and text of a prompt: both must agree, because a row is one of its own data set."""


def same_prompts(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The prompts that at least two groups answered at their last evaluation, those first on which their rewards differ most."""
    answered = [{run.name: last_answers(run) for run in group.runs} for group in groups]
    prompts = dict.fromkeys(prompt for by_run in answered for answers in by_run.values() for prompt in answers)
    found = []
    for prompt in prompts:
        views = [
            {"group": index, "run": name, "seed": run.seed, **_answer(answers[prompt])}
            for index, group in enumerate(groups)
            for run in group.runs
            if prompt in (answers := answered[index][name := run.name])
        ]
        if len({view["group"] for view in views}) > 1 or (len(groups) == 1 and len(views) > 1):
            found.append(_prompt(prompt, views, [answered[v["group"]][v["run"]][prompt] for v in views]))
    found.sort(key=lambda view: -view["spread"])
    return [view | {"teacher": _teacher(groups, view["row"], view["text"])} for view in found[:MAX_PROMPTS]]


def last_answers(run: Run) -> dict[Prompt, SampleRecord]:
    """The first answer to each prompt at the last evaluation whose answers were recorded."""
    own = [s for s in run.samples if s.phase == "eval" and s.who == "student"]
    last = max((s.step for s in own), default=0)
    found: dict[Prompt, SampleRecord] = {}
    for sample in own:
        if sample.step == last:
            found.setdefault(_key(sample), sample)
    return found


def shown_tokens(sample: SampleRecord) -> list[list[Any]]:
    """[text, colour level or None, KL or None] of each token; the parts of one character are one token, of the largest KL among them."""
    kls = list(sample.reverse_kl) if sample.reverse_kl is not None else [math.nan] * len(sample.tokens)
    runs = {first: (end, text) for first, end, text in sample.joined}
    tokens, index = [], 0
    while index < min(len(sample.tokens), MAX_TOKENS):
        end, text = runs.get(index, (index + 1, sample.tokens[index]))
        known = [kl for kl in kls[index:end] if math.isfinite(kl)]
        most = max(known, default=math.nan)
        tokens.append(
            [
                visible(text),
                None if math.isnan(most) else bisect_right(KL_EDGES, most),
                None if math.isnan(most) else float(f"{most:.3g}"),
            ]
        )
        index = max(end, index + 1)
    return tokens


def _key(sample: SampleRecord) -> Prompt:
    return (sample.prompt if sample.prompt_index is None else sample.prompt_index, sample.prompt)


def _prompt(prompt: Prompt, views: Sequence[dict[str, Any]], samples: Sequence[SampleRecord]) -> dict[str, Any]:
    by_group: dict[int, list[float]] = {}
    for view in views:
        if view["reward"] is not None:
            by_group.setdefault(view["group"], []).append(view["reward"])
    means = [fmean(rewards) for rewards in by_group.values()]
    return {
        "row": prompt[0] if isinstance(prompt[0], int) else None,
        "text": prompt[1],
        "special": [list(span) for span in samples[0].special],
        "answer": samples[0].answer,
        "answers": list(views),
        "rewards": {str(index): rewards for index, rewards in by_group.items()},
        "spread": max(means, default=0.0) - min(means, default=0.0),
    }


def _answer(sample: SampleRecord) -> dict[str, Any]:
    return {
        "step": sample.step,
        "tokens": shown_tokens(sample),
        "length": len(sample.tokens),
        "kl": _mean_kl(sample),
        "reward": sample.reward,
        "finished": sample.finished,
    }


def _teacher(groups: Sequence[Group], row: int | None, text: str) -> dict[str, Any] | None:
    """The teacher's own answer, of the first run that recorded one."""
    for run in (run for group in groups for run in group.runs):
        for sample in reversed(run.samples):
            same = sample.prompt_index == row if row is not None else sample.prompt == text
            if sample.who == "teacher" and sample.phase == "eval" and same:
                return _answer(sample)
    return None


def _mean_kl(sample: SampleRecord) -> float | None:
    """Mean reverse KL per token, where it is known."""
    known = [kl for kl in sample.reverse_kl or () if math.isfinite(kl)]
    return sum(known) / len(known) if known else None

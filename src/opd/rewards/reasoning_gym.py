"""Reward of the package reasoning-gym: each task's own verifier."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any, cast

from opd.errors import DataError
from opd.rewards.boxes import last_box, last_tag
from opd.types import Prompt

COLUMN = "reasoning_gym"
"""Column of the rows that `prompts.path: reasoning_gym:NAME` makes."""


def reasoning_gym(prompt: Prompt, response: str, finished: bool = True) -> float:
    """The score, from 0 to 1, that the task's verifier gives to the response; some give a part of 1 for an answer among other words.

    The answer is what the last <answer> tag or else the last \\boxed{} holds, or else the whole response. One cut off at the length
    limit (`finished` is False) needs a closed tag or box. Raises DataError for a prompt that is no task of reasoning-gym.
    """
    task = prompt.metadata.get(COLUMN)
    if not isinstance(task, Mapping):
        raise DataError(
            f"prompt {prompt.index} is no task of reasoning-gym, whose verifier reward 'reasoning_gym' asks; set prompts.path to "
            "reasoning_gym:NAME, or use another reward."
        )
    known = cast("Mapping[str, Any]", task)
    marked = [found for found in (last_tag(response), last_box(response)) if found is not None]
    if not marked and not finished:
        return 0.0
    answer = marked[0] if marked else response.strip()
    verifier = _verifier(known["name"], json.dumps(known["settings"], sort_keys=True))
    return float(verifier.score_answer(answer, entry=known["entry"]))


@lru_cache(maxsize=8)  # a run trains and is evaluated on two
def _verifier(name: str, settings: str) -> Any:
    return import_module("reasoning_gym").create_dataset(name, **json.loads(settings))

"""Reward for a response that is mathematically equal to the answer, as the package math-verify judges."""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from opd.errors import DataError, MissingDependencyError
from opd.rewards.boxes import last_box
from opd.rewards.exact import required_answer
from opd.types import Prompt

NO_LIMIT = None
"""math-verify's own limits need signals, which arrive in the main thread alone; reward.timeout limits the call in any thread."""


def math_verify(prompt: Prompt, response: str, finished: bool = True) -> float:
    """1 when math-verify finds response and answer equal, such as 1/2 and \\frac{2}{4}; else 0.

    The response is what its last \\boxed{} holds, or else what math-verify finds in the text. A response cut off at the length limit
    (`finished` is False) needs a closed \\boxed{}. Of an answer that is a worked solution, the last \\boxed{} or what follows ####
    counts. Raises DataError for an answer that is no mathematics, and MissingDependencyError without math-verify.
    """
    package = _package()
    gold = _parsed(package, _answer_in(required_answer(prompt, "math_verify")))
    if not gold:
        raise DataError(
            f"the answer of prompt {prompt.index} is {prompt.answer!r}, which math-verify cannot read; fix the row, or use exact_match."
        )
    box = last_box(response)
    if box is not None:
        found = _parsed(package, box)
    elif finished:
        found = package.parse(response, parsing_timeout=NO_LIMIT)
    else:
        return 0.0
    return float(package.verify(gold, found, timeout_seconds=NO_LIMIT))


def check_installed() -> None:
    """Raises MissingDependencyError, which says how to install it."""
    if find_spec("math_verify") is None:
        raise MissingDependencyError(
            "the reward 'math_verify' needs the package math-verify, which is not installed; pip install 'opd[math]'."
        )


def _package() -> Any:
    check_installed()
    for module in ("parser", "grader"):  # they warn once that no limit of theirs is set
        logging.getLogger(f"math_verify.{module}").setLevel(logging.ERROR)
    return import_module("math_verify")


def _answer_in(answer: str) -> str:
    box = last_box(answer)
    return answer.rpartition("####")[2].strip() if box is None else box


def _parsed(package: Any, written: str) -> list[Any]:
    """In a box, so that it is read whole and as LaTeX."""
    return package.parse(f"\\boxed{{{written}}}", parsing_timeout=NO_LIMIT)

"""Reward for a response that equals the answer."""

from __future__ import annotations

from opd.errors import DataError
from opd.types import Prompt


def exact_match(prompt: Prompt, response: str) -> float:
    """1 when response and answer are the same text, apart from white space around them; else 0."""
    return float(response.strip() == required_answer(prompt, "exact_match").strip())


def required_answer(prompt: Prompt, reward: str) -> str:
    """The prompt's answer. Raises DataError for a prompt without one."""
    if prompt.answer is None:
        raise DataError(
            f"prompt {prompt.index} has no answer, which reward {reward!r} compares the response with; "
            "add the answer to the row, set answer_column, or use another reward."
        )
    return prompt.answer

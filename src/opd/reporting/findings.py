"""Warnings from the numbers of a run: answers cut off at the length limit, and a teacher no better than its student."""

from __future__ import annotations

import math

from opd.reporting.files import SAMPLES_FILE
from opd.reporting.summary import Interval

MANY_CUT = 0.25  # of the answers; a student that is still to learn to end cuts a few

SHOWN_MORE = "prompts.teacher_prompt"


def cut_off(share: float, limit: int) -> str | None:
    """A warning when many answers end at the length limit."""
    if share < MANY_CUT:
        return None
    return (
        f"{share:.0%} of the answers were cut off at rollout.max_new_tokens={limit}. A cut answer cannot be right by its end, and does not "
        "teach the student to end. Raise rollout.max_new_tokens, or set rollout.stop if answers go on after what was asked for."
    )


def teacher_no_better(student: float, interval: Interval, teacher: float, *, shown_more: bool) -> str | None:
    """A warning when the teacher's accuracy is not above the interval of the student's, before training."""
    low, high = interval
    if not (math.isfinite(low) and math.isfinite(high)) or teacher > high:
        return None
    numbers = f"accuracy {teacher:.1%} against {student:.1%} [{100 * low:.1f}, {100 * high:.1f}]"
    if shown_more:
        return (
            f"The teacher is not measurably better than the student although it is shown {SHOWN_MORE}: {numbers}. Read its answers in "
            f"{SAMPLES_FILE}: reword {SHOWN_MORE} so that it uses what it is shown, show it more, or raise eval.prompts if the interval is "
            "wide."
        )
    return (
        f"The teacher is not measurably better than the student before training: {numbers}, so there is little accuracy to gain from it. "
        f"Read its answers in {SAMPLES_FILE} to see whether its prompts suit it, take a better teacher, or raise eval.prompts if the "
        "interval is wide."
    )

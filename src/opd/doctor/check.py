"""One finding of the doctor, and the running of many: a check that fails is a red one and stops no other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from opd.errors import OpdError

Verdict = Literal["green", "yellow", "red", "skipped"]
FROM_TEACHER = "rollout.lmbda: 0.5 with rollout.off_policy: teacher"
"""The key that mixes a teacher's own answers into the student's, for a teacher in this process."""
FROM_DATA = "rollout.lmbda: 0.5 with rollout.off_policy: dataset and answers of the teacher in the column prompts.response_column"
"""The same for a teacher behind a server."""

Number = float | int | str | None | Sequence[float]
"""What a check looked at. Of an estimate with an interval: the estimate, the lower end, the upper end."""

BADNESS: tuple[Verdict, ...] = ("skipped", "green", "yellow", "red")
EXIT_CODES: Mapping[Verdict, int] = {"green": 0, "skipped": 0, "yellow": 1, "red": 2}


@dataclass(frozen=True, kw_only=True)
class Check:
    """A check's verdict with the numbers that it rests on."""

    name: str
    verdict: Verdict
    seen: str
    """One or two sentences about what was found."""
    numbers: Mapping[str, Number] = field(default_factory=dict[str, Number])
    why: str = ""
    """Why it matters; empty where nothing is wrong."""
    mend: str = ""
    """The line of a recipe, or the command, that mends it; empty where nothing is wrong."""
    details: tuple[str, ...] = ()
    """Lines that are shown as they are, such as rendered prompts."""


Examination = Callable[[], Sequence[Check]]
"""Looks at one thing. An exception that it raises is a red check."""


def run_checks(examinations: Mapping[str, Examination]) -> list[Check]:
    """The checks of every examination, in order. One that raises an exception gives a red check with its message."""
    found: list[Check] = []
    for name, examine in examinations.items():
        try:
            found += examine()
        except Exception as error:  # it may run somebody else's model, template, reward or server
            found.append(failed(name, error))
    return found


def failed(name: str, error: Exception) -> Check:
    """The red check of an examination that raised this."""
    said = str(error) if isinstance(error, OpdError) else f"{type(error).__name__}: {error}"
    return Check(
        name=name,
        verdict="red",
        seen=said or type(error).__name__,
        why="A run would meet the same error, or one that hides behind it.",
        mend="" if isinstance(error, OpdError) else "opd train … --debug shows where it comes from.",
    )


def skipped(name: str, reason: str) -> Check:
    """The check was not made; `reason` is a sentence."""
    return Check(name=name, verdict="skipped", seen=reason)


def worst(checks: Sequence[Check]) -> Verdict:
    """The worst verdict of all; green where nothing was found."""
    return BADNESS[max((BADNESS.index(check.verdict) for check in checks), default=BADNESS.index("green"))]


def exit_code(checks: Sequence[Check]) -> int:
    """0 where all checks are green or skipped, 1 with a yellow one, 2 with a red one."""
    return EXIT_CODES[worst(checks)]

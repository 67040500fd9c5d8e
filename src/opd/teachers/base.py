"""What a teacher is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from opd.types import Rollout, Target, TargetKind


class Teacher(Protocol):
    """Scores the student's responses, token by token. It says which kinds of target it supplies; the objective says which it
    needs; `Objective.check_supplies` matches the two before anything runs."""

    name: str
    supplies: frozenset[TargetKind]

    def score(self, rollouts: Sequence[Rollout]) -> list[Target]:
        """One target per rollout, one row per response token."""
        ...

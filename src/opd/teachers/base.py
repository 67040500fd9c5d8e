"""The teacher protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from opd.teachers.vocabulary import VocabularyMatch
from opd.types import AnyTarget, HiddenTarget, Rollout, TargetKind

if TYPE_CHECKING:
    from torch import Tensor

    from opd.losses import Objective


class Teacher(Protocol):
    """Scores the student's responses, token by token. Any object with these members is one: nothing has to be inherited.

    It says which kinds of target it supplies, and the objective says which it needs: `bind_objective` matches the two before anything
    runs.
    """

    @property
    def name(self) -> str:
        """Its name in messages."""
        ...

    @property
    def supplies(self) -> frozenset[TargetKind]:
        """The kinds of target that `score` can hand out."""
        ...

    @property
    def exact_kind(self) -> TargetKind | None:
        """The kind that holds the whole distribution ("hidden" or "dense"), which evaluations compare with. None: there is none, and
        evaluations report the reward alone."""
        ...

    @property
    def vocabulary(self) -> VocabularyMatch:
        """The token ids that mean the same to it and to the student."""
        ...

    @property
    def rows(self) -> int:
        """Ids at or beyond this are unreadable to it."""
        ...

    def bind_objective(self, objective: Objective) -> TargetKind:
        """The kind of target that it hands out for this objective: `objective.check_supplies(self.supplies, self.name)`, which raises
        ObjectiveError when nothing that it supplies will do."""
        ...

    def groups(self, rollouts: Sequence[Rollout]) -> Mapping[str, Sequence[int]]:
        """The rollouts that may share a micro-batch, by their places. One model has one group, "", of all; named groups are those of
        several teachers, which metrics tell apart."""
        ...

    def score(self, rollouts: Sequence[Rollout], kind: TargetKind) -> Sequence[AnyTarget]:
        """One target per rollout, in order; row t is the teacher's view of response token t."""
        ...

    def logits(self, target: HiddenTarget) -> Tensor:
        """Logits [tokens, vocabulary] of one of its hidden targets. Never called on a teacher that supplies none."""
        ...

    def context(self) -> AbstractContextManager[None]:
        """Entered while its model is used by others, such as to draw its own answers."""
        ...

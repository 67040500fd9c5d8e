"""Several teachers in the place of one: each prompt has its own, or all of them read every response."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from opd.data.rows import lookup
from opd.errors import DataError, ObjectiveError
from opd.losses import WEIGHT_SUM_TOLERANCE, Objective
from opd.teachers.local import LocalTeacher
from opd.teachers.vocabulary import VocabularyMatch
from opd.types import AnyTarget, DenseTarget, HiddenTarget, Prompt, Rollout, TargetKind, TeacherMixture

WHOLE: frozenset[TargetKind] = frozenset({"hidden", "dense"})


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Teachers of one vocabulary. What `LocalTeacher` offers, for all of them."""

    members: Mapping[str, LocalTeacher]
    mixture: Literal["routing", "probability", "logit", "loss"]
    weights: Mapping[str, float]
    """Of a mixture, for prompts without weights of their own."""
    weights_column: str | None = None
    """Where a prompt keeps its own."""

    @property
    def name(self) -> str:
        return ", ".join(self.members)

    @property
    def vocabulary(self) -> VocabularyMatch:
        """The same for all."""
        return next(iter(self.members.values())).vocabulary

    @property
    def rows(self) -> int:
        """Ids that every member can read."""
        return min(member.rows for member in self.members.values())

    @property
    def supplies(self) -> frozenset[TargetKind]:
        """What every member supplies; a mixture needs whole distributions."""
        common = frozenset.intersection(*(member.supplies for member in self.members.values()))
        return common if self.mixture == "routing" else common & WHOLE

    @property
    def exact_kind(self) -> TargetKind:
        return "hidden" if all(m.exact_kind == "hidden" for m in self.members.values()) else "dense"

    @property
    def kind(self) -> TargetKind:
        """What `serve` settled, the same for all."""
        return next(iter(self.members.values())).kind

    def serve(self, objective: Objective) -> TargetKind:
        """Settle what `score` hands out for this objective. Raises ObjectiveError when nothing that all of them supply will do."""
        if not self.supplies and self.mixture != "routing":
            raise ObjectiveError(
                f"mixture.kind={self.mixture} mixes whole distributions, and not every teacher of {self.name} supplies one; drop their "
                "supply, or use mixture.kind=routing."
            )
        kind = objective.check_supplies(self.supplies, self.name)
        for member in self.members.values():
            member.serve(objective)
            member.kind = kind
        return kind

    def groups(self, rollouts: Sequence[Rollout]) -> dict[str, list[int]]:
        """Which rollouts may share a micro-batch: those of one teacher, under its name; a mixture has one group."""
        if self.mixture != "routing":
            return {"": list(range(len(rollouts)))}
        found: dict[str, list[int]] = {name: [] for name in self.members}
        for index, rollout in enumerate(rollouts):
            found[self.route(rollout.prompt)].append(index)
        return {name: indices for name, indices in found.items() if indices}

    def route(self, prompt: Prompt) -> str:
        """The name of this prompt's teacher. Raises DataError when there is none of that name."""
        if prompt.teacher is not None and prompt.teacher in self.members:
            return prompt.teacher
        named = (
            "names no teacher"
            if prompt.teacher is None
            else f"names the teacher '{prompt.teacher}', which is not there"
        )
        raise DataError(
            f"Prompt {prompt.index} {named}; the teachers are {', '.join(self.members)}. Name one in the column "
            "prompts.teacher_column, or mix them: mixture.kind=probability, logit or loss."
        )

    def weights_of(self, prompt: Prompt) -> tuple[float, ...]:
        """This prompt's weights, in the order of the members. Raises DataError for own ones that do not sum to one."""
        own = lookup(prompt.metadata, self.weights_column)[1] if self.weights_column is not None else None
        if own is None:
            return tuple(self.weights[name] for name in self.members)
        numbers = isinstance(own, Mapping) and all(
            isinstance(w, (int, float)) and not isinstance(w, bool) for w in own.values() if w is not None
        )
        if not numbers or not set(own) <= set(self.members):
            raise DataError(
                f"Prompt {prompt.index} has {own!r} as {self.weights_column!r}; it has to be the weight of every teacher by name, of "
                f"{', '.join(self.members)}."
            )
        weights = tuple(float(own.get(name) or 0.0) for name in self.members)
        if min(weights) < 0 or not abs(sum(weights) - 1.0) <= WEIGHT_SUM_TOLERANCE:
            raise DataError(
                f"Prompt {prompt.index} has the teacher weights {dict(own)!r}, which sum to {sum(weights):g}; weights are ≥ 0 and sum "
                "to 1. Divide them by their sum."
            )
        return weights

    def score(self, rollouts: Sequence[Rollout], kind: TargetKind | None = None) -> list[AnyTarget]:
        """One target per rollout, in order: its own teacher's, or the mixture of all."""
        kind = kind or self.kind
        if self.mixture == "routing":
            routed: dict[int, AnyTarget] = {}
            for name, members in self.groups(rollouts).items():
                routed |= zip(members, self.members[name].score([rollouts[i] for i in members], kind), strict=True)
            return [routed[i] for i in range(len(rollouts))]
        columns = [member.score(rollouts, kind) for member in self.members.values()]
        return [
            self._mixture(rollout, targets)
            for rollout, targets in zip(rollouts, zip(*columns, strict=True), strict=True)
        ]

    def _mixture(self, rollout: Rollout, targets: Sequence[object]) -> TeacherMixture:
        whole = tuple(t for t in targets if isinstance(t, (HiddenTarget, DenseTarget)))
        assert len(whole) == len(self.members) and self.mixture != "routing"
        return TeacherMixture(
            targets=whole, weights=torch.tensor(self.weights_of(rollout.prompt)), mixture=self.mixture
        )

    def logits(self, target: HiddenTarget) -> torch.Tensor:
        """Teacher logits of a hidden target of any member: they share the vocabulary."""
        return next(iter(self.members.values())).logits(target)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Nothing to do: members take turns, and each sees to itself."""
        yield


AnyTeacher = LocalTeacher | Ensemble
WeightsAt = Callable[[int], Mapping[str, float]]

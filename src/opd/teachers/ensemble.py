"""Several teachers in the place of one: each prompt has its own, or all of them read every response."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch

from opd.data.rows import lookup
from opd.errors import DataError, ObjectiveError
from opd.losses import WEIGHT_SUM_TOLERANCE, Objective
from opd.ranks import ALONE, Ranks
from opd.teachers.base import Teacher
from opd.teachers.local import sampled_logp
from opd.teachers.vocabulary import VocabularyMatch
from opd.types import AnyTarget, Batch, DenseTarget, HiddenTarget, Prompt, Rollout, TargetKind, TeacherMixture

WHOLE: frozenset[TargetKind] = frozenset({"hidden", "dense"})


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Teachers of one vocabulary, together one Teacher."""

    members: Mapping[str, Teacher]
    mixture: Literal["routing", "probability", "logit", "loss"]
    weights: Mapping[str, float]
    """Of a mixture, for prompts without weights of their own."""
    weights_column: str | None = None
    """Column of a prompt's own weights."""
    weights_at: Callable[[int], Mapping[str, float]] | None = None
    """The weights of a step, where they move."""
    balance_tokens: bool = False
    """With routing, the tokens of every member's prompts weigh in sum as `weights` say."""

    def at(self, step: int) -> Ensemble:
        """The ensemble with the weights of this step."""
        return self if self.weights_at is None else replace(self, weights=self.weights_at(step))

    @property
    def shares(self) -> Mapping[str, float] | None:
        """Sum of token weights that each group is to have; None leaves them as they are."""
        return self.weights if self.balance_tokens else None

    @property
    def mixed(self) -> Mapping[str, Teacher]:
        """The members that all read every response; none with routing."""
        return {} if self.mixture == "routing" else self.members

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
        """Kinds that every member supplies; a mixture needs whole distributions."""
        common = frozenset.intersection(*(member.supplies for member in self.members.values()))
        return common if self.mixture == "routing" else common & WHOLE

    @property
    def exact_kind(self) -> TargetKind | None:
        """The whole distribution, in a form that every member has."""
        kinds = {member.exact_kind for member in self.members.values()}
        return None if None in kinds else "hidden" if kinds == {"hidden"} else "dense"

    def bind_objective(self, objective: Objective) -> TargetKind:
        """The kind that all members hand out for this objective. Raises ObjectiveError when nothing that all of them supply will do."""
        if not self.supplies and self.mixture != "routing":
            raise ObjectiveError(
                f"mixture.kind={self.mixture} mixes whole distributions, and not every teacher of {self.name} supplies one; drop their "
                "supply, take teachers in this process, or use mixture.kind=routing."
            )
        kind = objective.check_supplies(self.supplies, self.name)
        for member in self.members.values():
            member.bind_objective(objective)
        return kind

    def groups(self, rollouts: Sequence[Rollout]) -> dict[str, list[int]]:
        """Rollouts that may share a micro-batch: those of one teacher, under its name; a mixture has one group."""
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

    def choice(self, prompt: Prompt) -> dict[str, float]:
        """Probability of each member to answer this prompt itself. Raises DataError as `route` and `weights_of` do."""
        if self.mixture == "routing":
            return {self.route(prompt): 1.0}
        return dict(zip(self.members, self.weights_of(prompt), strict=True))

    def score(self, rollouts: Sequence[Rollout], kind: TargetKind) -> list[AnyTarget]:
        """One target per rollout, in order: its own teacher's, or the mixture of all."""
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

    def context(self) -> AbstractContextManager[None]:
        """Nothing to do: members take turns, and each enters its own."""
        return nullcontext()

    def member_metrics(
        self, rollouts: Sequence[Rollout], batches: Sequence[Batch] | None, ranks: Ranks = ALONE
    ) -> dict[str, float]:
        """Per-member metrics: token share (routing) or mean mixture weight, plus a reverse-KL estimate for mixtures whose targets are in
        the `batches` of every rank (None: of none). With routing, the update itself measures each member."""
        if self.mixture == "routing":
            tokens, groups = sum(len(r.response_ids) for r in rollouts), self.groups(rollouts)
            own = {n: sum(len(rollouts[i].response_ids) for i in groups.get(n, ())) for n in self.members}
            return {f"teacher/{name}/share": count / tokens for name, count in own.items()}
        given = [self.weights_of(r.prompt) for r in rollouts]
        found = {f"teacher/{n}/weight": sum(w[i] for w in given) / len(given) for i, n in enumerate(self.members)}
        for index, name in enumerate(() if batches is None else self.members):
            found |= self._distance(index, name, batches or (), ranks)
        return found

    def _distance(self, index: int, name: str, batches: Sequence[Batch], ranks: Ranks) -> dict[str, float]:
        """Mean log-prob (nats) that a member gives the sampled tokens, at one product with its head; and, where the sampler's is
        known, their difference, which estimates the reverse KL to that member."""
        logps, gaps = [], []
        for batch in batches:
            assert isinstance(batch.target, TeacherMixture)
            logp = sampled_logp(batch.target.targets[index], batch.response_ids, self.vocabulary)
            logps.append(logp)
            if batch.sampler_logp is not None:
                gaps.append(batch.sampler_logp - logp)
        parts = ranks.gather(([logp.cpu().numpy() for logp in logps], [gap.cpu().numpy() for gap in gaps]))
        if not ranks.alone:
            logps, gaps = ([torch.from_numpy(one) for part in parts for one in part[kind]] for kind in (0, 1))
        found = {f"teacher/{name}/teacher_logp": float(torch.cat(logps).mean())}
        if len(gaps) == len(logps):
            found[f"teacher/{name}/reverse_kl_estimate"] = float(torch.cat(gaps).mean())
        return found

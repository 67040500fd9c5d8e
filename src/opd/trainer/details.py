"""Both models' views of the rollouts that are recorded, taken from the loss's own pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from opd.kernels.views import by_sequence
from opd.ranks import Ranks
from opd.teachers.base import Teacher
from opd.types import Batch, ModelView, Rollout, TokenViews

Views = tuple[ModelView, ModelView]
"""The student's and the teacher's, of the same tokens."""


class ViewCollector:
    """Takes the views of some rollouts while a loss goes over micro-batches; those of a first pass stay, where there are two."""

    def __init__(self, rollouts: Iterable[Rollout] = ()) -> None:
        self.wanted = {rollout.id for rollout in rollouts}
        self.found: dict[int, TokenViews] = {}
        """By `Rollout.id`."""

    def rows(self, batch: Batch) -> torch.Tensor | None:
        """Indices of the batch's response tokens whose views are wanted; None for none."""
        ids = self.wanted - self.found.keys()
        members = [place for place, rollout in enumerate(batch.rollouts) if rollout.id in ids]
        if not members:
            return None
        chosen = torch.tensor(members, device=batch.sequence_index.device)
        rows = torch.isin(batch.sequence_index, chosen).nonzero().squeeze(-1)
        return rows if len(rows) else None

    def of_all(self, ranks: Ranks) -> Mapping[int, TokenViews]:
        """By `Rollout.id`, the views that any rank has taken."""
        whole: dict[int, TokenViews] = {}
        for found in ranks.gather(self.found):
            whole |= found
        return whole

    def add(self, batch: Batch, rows: torch.Tensor, views: Views) -> None:
        """Take the views of those rows of the batch."""
        for member, found in by_sequence(views, positions(batch)[rows], batch.sequence_index[rows]).items():
            self.found[batch.rollouts[member].id] = found


def positions(batch: Batch) -> torch.Tensor:
    """The place of each of the batch's tokens in its response, [tokens], from 0."""
    lengths = [len(rollout.response_ids) for rollout in batch.rollouts]
    every = torch.cat([torch.arange(length) for length in lengths]).to(batch.response_ids.device)
    return every if batch.kept is None else every[batch.kept]


def teacher_names(teacher: Teacher | None, rollouts: Sequence[Rollout]) -> Mapping[int, str]:
    """The teacher that each rollout is routed to, by `Rollout.id`; empty where there is one teacher, or none."""
    groups = {} if teacher is None else teacher.groups(rollouts)
    return {rollouts[i].id: name for name, members in groups.items() if name for i in members}

"""Rollouts → micro-batches with the teacher's view of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from opd.data.pack import concatenate, pack
from opd.teachers.local import LocalTeacher
from opd.types import Batch, Rollout, TargetKind


def scored_batches(
    rollouts: Sequence[Rollout], teacher: LocalTeacher, kind: TargetKind, **layout: Any
) -> Sequence[Batch]:
    """Micro-batches with targets; `layout` is what `pack` takes. Hidden states, top-k and sampled log-probs are small and scored at
    once; whole logits are scored when their micro-batch is used, and not kept."""
    if kind == "dense":
        return _ScoredWhenUsed(pack(rollouts, None, **layout), teacher)
    return pack(rollouts, teacher.score(rollouts, kind), **layout)


class _ScoredWhenUsed(Sequence[Batch]):
    def __init__(self, batches: list[Batch], teacher: LocalTeacher) -> None:
        self._batches = batches
        self._teacher = teacher

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        batch = self._batches[index]
        targets = self._teacher.score(batch.rollouts, "dense")
        return dataclasses.replace(batch, target=concatenate(targets, batch.response_ids.device))

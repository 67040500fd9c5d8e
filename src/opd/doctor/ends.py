"""A teacher's probability of each id at the last token of an answer, or the most that it can be where the teacher tells only a part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from opd.teachers.base import Teacher
from opd.types import DenseTarget, HiddenTarget, Rollout, SampledTarget, TargetKind, TopKTarget


@dataclass(frozen=True, kw_only=True)
class EndMass:
    """Mean probabilities at the last tokens of some answers, one for each id."""

    least: tuple[float, ...]
    """An id that the teacher did not tell at an end counts as 0 there."""
    most: tuple[float, ...]
    """It counts as much as the told probabilities leave for it; the same as `least` where the whole distribution is known."""


def end_mass(teacher: Teacher, answers: Sequence[Rollout], ids: Sequence[int], kind: TargetKind) -> EndMass:
    """`ids` are below the teacher's vocabulary size; there is at least one answer, and none is empty."""
    bounds = []
    for answer, target in zip(answers, teacher.score(answers, kind), strict=True):
        if isinstance(target, HiddenTarget):
            last = replace(target, hidden=target.hidden[-1:])
            target = DenseTarget(logits=teacher.logits(last))
        assert isinstance(target, (DenseTarget, TopKTarget, SampledTarget))
        if isinstance(target, DenseTarget):
            whole = target.logits[-1].float().softmax(-1)[list(ids)].cpu()
            bounds.append(torch.stack([whole, whole]))
        else:
            bounds.append(_told(target, ids, answer.response_ids[-1]))
    least, most = torch.stack(bounds).mean(0).tolist()
    return EndMass(least=tuple(least), most=tuple(most))


def _told(target: TopKTarget | SampledTarget, ids: Sequence[int], sampled: int) -> torch.Tensor:
    """The least and the most [2, ids] that the last row can give each id; `sampled` is the row's own token."""
    known: dict[int, float] = {}
    highest = 1.0  # of an id that is not told
    if isinstance(target, TopKTarget):
        probabilities = target.teacher_logp[-1].exp().tolist()
        known = dict(zip(target.ids[-1].tolist(), probabilities, strict=True))
        highest = min(probabilities)
    own = target.sampled_logp if isinstance(target, TopKTarget) else target.teacher_logp
    if own is not None:
        known.setdefault(sampled, float(own[-1].exp()))
    highest = max(0.0, min(highest, 1.0 - sum(known.values())))
    return torch.tensor([[known.get(i, 0.0) for i in ids], [known.get(i, highest) for i in ids]])

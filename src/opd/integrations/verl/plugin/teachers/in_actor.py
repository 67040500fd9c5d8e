"""Teachers in the actor's workers, one or several, which read the very micro-batch that the student is trained on."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from verl.utils import tensordict_utils as tu

from opd.errors import ConfigError
from opd.integrations.verl.plugin.alignment import ResponseTokens
from opd.integrations.verl.plugin.model_checks import common_vocabulary
from opd.integrations.verl.plugin.settings import Settings
from opd.integrations.verl.plugin.teachers.base import TargetSlice
from opd.integrations.verl.plugin.teachers.frozen_model import FrozenTeacher, StudentBase
from opd.teachers.vocabulary import joined
from opd.types import HiddenTarget, TeacherMixture


class InActorTeachers:
    """The models of `opd.teacher` or `opd.teachers`."""

    def __init__(self, settings: Settings, engine: Any) -> None:
        self.settings = settings
        self.names = tuple(settings.all_teachers)
        self.members = [
            StudentBase(engine) if one.is_student else FrozenTeacher(one, engine)
            for one in settings.all_teachers.values()
        ]
        self.vocabulary = joined([common_vocabulary(engine.model_config, one.model_config) for one in self.members])
        self.rows = min(member.rows for member in self.members)

    def offload(self) -> None:
        """Move every teacher's shards to host memory."""
        for member in self.members:
            member.offload()

    def prepare(
        self, inputs: Mapping[str, Any], micro_batch: Any, tokens: ResponseTokens, /
    ) -> AbstractContextManager[Sequence[TargetSlice]]:
        """Run every teacher on the whole micro-batch, in the same order on every worker: gathering weights is a collective."""
        hidden = [member.hidden(inputs, micro_batch, tokens) for member in self.members]
        routes = self._routes(micro_batch, tokens) if self.settings.mixture.kind == "routing" else None
        return self._targets(hidden, routes)

    @contextmanager
    def _targets(
        self, hidden: Sequence[Tensor], routes: Mapping[str, Tensor] | None
    ) -> Iterator[Sequence[TargetSlice]]:
        with ExitStack() as stack:
            targets = [
                stack.enter_context(member.target(own)) for member, own in zip(self.members, hidden, strict=True)
            ]
            if routes is not None:
                yield [_rows_of(name, t, routes[name]) for name, t in zip(self.names, targets, strict=True)]
            elif len(targets) == 1:
                yield [TargetSlice(target=targets[0])]
            else:
                weights = torch.tensor(list(self.settings.shares().values()), device=hidden[0].device)
                kind: Any = self.settings.mixture.kind
                yield [
                    TargetSlice(target=TeacherMixture(targets=tuple(targets), weights=weights, mixture=kind)),
                ]

    def _routes(self, micro_batch: Any, tokens: ResponseTokens) -> dict[str, Tensor]:
        """Indices of the response tokens of each teacher, by the field of their sample that names it."""
        column = self.settings.prompts.teacher_column
        if column not in micro_batch:
            raise ConfigError(
                f"opd.prompts.teacher_column={column}: the training batch has no such field; it has "
                f"{', '.join(sorted(map(str, micro_batch.keys())))}. Use a column of the data files that holds the teacher's name."
            )
        named = [str(value) for value in tu.get(micro_batch, column)]
        unknown = sorted(set(named) - set(self.names))
        if unknown:
            raise ConfigError(
                f"opd.prompts.teacher_column={column}: a sample says {unknown[0]!r}, and the teachers are {', '.join(self.names)}; name a "
                f"teacher of opd.teachers {unknown[0]!r}, or correct the data."
            )
        number = torch.tensor([self.names.index(value) for value in named], device=tokens.ids.device)
        of_token = number[tokens.sequence_index]
        return {name: (of_token == i).nonzero().squeeze(-1) for i, name in enumerate(self.names)}


def _rows_of(name: str, target: HiddenTarget, rows: Tensor) -> TargetSlice:
    return TargetSlice(target=HiddenTarget(hidden=target.hidden[rows], head=target.head), rows=rows, name=name)

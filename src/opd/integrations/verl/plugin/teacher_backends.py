"""Who says what the student should have done: teachers in the actor's workers, one or several."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from verl.utils import tensordict_utils as tu

from opd.errors import ConfigError
from opd.integrations.verl.plugin.alignment import ResponseTokens
from opd.integrations.verl.plugin.checks import common_vocabulary
from opd.integrations.verl.plugin.settings import Settings
from opd.integrations.verl.plugin.teacher import StudentBase, Teacher
from opd.teachers.vocabulary import VocabularyMatch, joined
from opd.types import AnyTarget, HiddenTarget, TeacherMixture


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is said about some of the response tokens."""

    target: AnyTarget
    rows: Tensor | None = None
    """Which of them; None is all."""
    name: str = ""
    """The teacher's, where each token has one of several."""


class Source(Protocol):
    """Where the teacher's side of the loss comes from."""

    vocabulary: VocabularyMatch
    """Token ids that student and every teacher own."""
    rows: int
    """Ids that every teacher has a row to read by."""

    def look(
        self, inputs: Mapping[str, Any], micro_batch: Any, tokens: ResponseTokens, /
    ) -> AbstractContextManager[Sequence[Part]]:
        """Called on every worker before the student's forward pass; entered at the student's output layer."""
        ...

    def leave(self) -> None:
        """Leave the accelerator until the next look: verl has moved the student's weights to host memory."""
        ...


def make_source(settings: Settings, engine: Any) -> Source:
    """The source that `opd.placement` names, for verl's engine of the student."""
    if settings.placement == "pool":
        from opd.integrations.verl.plugin.served_logprobs import PoolTeacher

        return PoolTeacher(settings, engine)
    if settings.placement == "hidden":
        from opd.integrations.verl.plugin.served_hidden_states import HiddenTeacher

        return HiddenTeacher(settings, engine)
    return ActorTeachers(settings, engine)


class ActorTeachers:
    """Frozen models in the actor's workers, which read the very micro-batch that the student is trained on."""

    def __init__(self, settings: Settings, engine: Any) -> None:
        self.settings = settings
        self.names = tuple(settings.teachers)
        self.members = [
            StudentBase(engine) if one.adapter_off else Teacher(one, engine) for one in settings.teachers.values()
        ]
        self.vocabulary = joined([self._vocabulary(engine.model_config, member) for member in self.members])
        self.rows = min(member.rows for member in self.members)

    def leave(self) -> None:
        """Every teacher's shards move to host memory."""
        for member in self.members:
            member.leave()

    @staticmethod
    def _vocabulary(student: Any, member: Teacher | StudentBase) -> VocabularyMatch:
        teacher = member.model_config
        return common_vocabulary(
            student.path, teacher.path, student.hf_config, teacher.hf_config, student.tokenizer, teacher.tokenizer
        )

    def look(
        self, inputs: Mapping[str, Any], micro_batch: Any, tokens: ResponseTokens, /
    ) -> AbstractContextManager[Sequence[Part]]:
        """Every teacher reads the whole micro-batch, in the same order on every worker: gathering its weights is a collective."""
        hidden = [member.hidden(inputs, micro_batch, tokens) for member in self.members]
        routes = self._routes(micro_batch, tokens) if self.settings.mixture == "routing" else None
        return self._parts(hidden, routes)

    @contextmanager
    def _parts(self, hidden: Sequence[Tensor], routes: Mapping[str, Tensor] | None) -> Iterator[Sequence[Part]]:
        with ExitStack() as stack:
            targets = [
                stack.enter_context(member.target(own)) for member, own in zip(self.members, hidden, strict=True)
            ]
            if routes is not None:
                yield [_part_of(name, t, routes[name]) for name, t in zip(self.names, targets, strict=True)]
            elif len(targets) == 1:
                yield [Part(target=targets[0])]
            else:
                weights = [self.settings.share(name) for name in self.names]
                yield [
                    Part(
                        target=TeacherMixture(
                            targets=tuple(targets),
                            weights=torch.tensor(weights, device=hidden[0].device),
                            mixture=self.settings.mixture,  # pyright: ignore[reportArgumentType]
                        )
                    )
                ]

    def _routes(self, micro_batch: Any, tokens: ResponseTokens) -> dict[str, Tensor]:
        """The response tokens of each teacher, by a field of the sample that they belong to."""
        key = self.settings.teacher_key
        if key not in micro_batch:
            raise ConfigError(
                f"opd.teacher_key={key}: the training batch has no such field; it has {', '.join(sorted(map(str, micro_batch.keys())))}. "
                "Use a column of the data files that holds the teacher's name."
            )
        said = [str(value) for value in tu.get(micro_batch, key)]
        unknown = sorted(set(said) - set(self.names))
        if unknown:
            raise ConfigError(
                f"opd.teacher_key={key}: a sample says {unknown[0]!r}, and the teachers are {', '.join(self.names)}; name a teacher of "
                f"opd.teachers {unknown[0]!r}, or correct the data."
            )
        number = torch.tensor([self.names.index(value) for value in said], device=tokens.ids.device)
        of_token = number[tokens.sequence_index]
        return {name: (of_token == i).nonzero().squeeze(-1) for i, name in enumerate(self.names)}


def _part_of(name: str, target: HiddenTarget, rows: Tensor) -> Part:
    return Part(target=HiddenTarget(hidden=target.hidden[rows], head=target.head), rows=rows, name=name)

"""Teacher backends: frozen models in the actor's workers, or servers of verl's that send log-probs or hidden states."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from opd.integrations.verl.plugin.alignment import ResponseTokens
from opd.teachers.vocabulary import VocabularyMatch
from opd.types import AnyTarget


@dataclass(frozen=True, kw_only=True)
class TargetSlice:
    """A teacher target for some of the response tokens."""

    target: AnyTarget
    rows: Tensor | None = None
    """Indices of the response tokens; None is all."""
    name: str = ""
    """The teacher's name, where each token has one of several."""


class TeacherBackend(Protocol):
    """Supplies the targets of a micro-batch."""

    vocabulary: VocabularyMatch
    """Token ids that student and every teacher own."""
    rows: int
    """Number of ids that every teacher has an embedding for."""

    def prepare(
        self, inputs: Mapping[str, Any], micro_batch: Any, tokens: ResponseTokens, /
    ) -> AbstractContextManager[Sequence[TargetSlice]]:
        """The targets, as a context that the student's output layer enters. Every worker calls this before the student's forward pass.

        `inputs` are the student's model inputs.
        """
        ...

    def offload(self) -> None:
        """Move weights to host memory until the next `prepare`: verl has moved the student's weights there."""
        ...

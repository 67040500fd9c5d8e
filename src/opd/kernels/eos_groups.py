"""Groups of tokens that count as one, in the chunk loop (`losses.groups` has the definition)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from opd.losses.groups import Groups, merge_tokens_, spread_

if TYPE_CHECKING:
    from opd.kernels.chunk_loop import StudentLogits


class MergedLogits:
    """Another's logits in which groups of tokens are one token each, and their gradient as one of the logits themselves."""

    def __init__(self, plain: StudentLogits, groups: Groups) -> None:
        self.plain, self.groups = plain, groups
        self.wants_gradient = plain.wants_gradient
        self.shares: list[Tensor] = []
        """Of the members of each group, in the last chunk."""
        self._chunk: Tensor | None = None

    def chunks(self) -> Iterable[Any]:
        return self.plain.chunks()

    def buffer(self) -> Tensor:
        made = self.plain.buffer()
        self._chunk = made if self._chunk is None else self._chunk  # the first is the student's
        return made

    def logits(self, index: Any, out: Tensor, fill: float) -> Tensor:
        logits = self.plain.logits(index, out, fill)
        shares = merge_tokens_(logits, self.groups, fill)
        if self._chunk is not None and out.data_ptr() == self._chunk.data_ptr():  # not of rows that are done again
            self.shares = shares
        return logits

    def gradient_room(self, index: Any, settle: Callable[[], None]) -> None:
        return None

    def add_gradient(self, gradient: Tensor, scale: Tensor, rows: Any) -> None:
        spread_(gradient, self.groups, self.shares)
        self.plain.add_gradient(gradient, scale, rows)

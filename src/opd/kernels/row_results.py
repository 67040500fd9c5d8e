"""The results of a row pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(kw_only=True)
class RowResults:
    """Per-token results of a chunk. The chunk's logits have become d(loss)/d(logits) / `scale`, row by row."""

    values: dict[str, Tensor]
    scale: Tensor
    """[rows]; folded into the hidden rows, which are much shorter than the vocabulary."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """Sums of rows from which their gradient can be made again; NaN in rows that were recomputed by autograd."""

    @classmethod
    def join(cls, parts: Sequence[RowResults], like: Tensor) -> RowResults:
        """One after the other; `like` gives dtype and device when there are none."""
        if not parts:
            return cls(values={}, scale=like.new_zeros(0))
        return cls(
            values={name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values},
            scale=torch.cat([part.scale for part in parts]),
            state={name: torch.cat([part.state[name] for part in parts]) for name in parts[0].state},
        )

    def nonfinite_rows(self) -> Tensor:
        """Positions whose loss or entropy is not finite: where something has probability 0, and −inf met 0."""
        seen = [self.values[name] for name in ("loss", "student_entropy", "teacher_entropy") if name in self.values]
        return (~torch.stack(seen).sum(0).isfinite()).nonzero().squeeze(-1)

    def replace(self, where: Tensor, other: RowResults) -> None:
        """Put the rows of `other` at the positions `where`."""
        for name, value in other.values.items():
            if name in self.values:
                self.values[name][where] = value.to(self.values[name].dtype)
        self.scale[where] = other.scale
        for value in self.state.values():
            value[where] = torch.nan

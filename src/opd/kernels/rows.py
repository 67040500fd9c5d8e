"""What a row pass leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(kw_only=True)
class Rows:
    """Per-token results of a chunk. The chunk's logits have become d(loss)/d(logits) / `scale`, row by row."""

    values: dict[str, Tensor]
    scale: Tensor
    """[rows]; folded into the hidden rows, which are much shorter than the vocabulary."""

    @classmethod
    def join(cls, parts: Sequence[Rows], like: Tensor) -> Rows:
        """One after the other; `like` gives dtype and device when there are none."""
        if not parts:
            return cls(values={}, scale=like.new_zeros(0))
        names = parts[0].values.keys()
        return cls(
            values={name: torch.cat([part.values[name] for part in parts]) for name in names},
            scale=torch.cat([part.scale for part in parts]),
        )

    def broken(self) -> Tensor:
        """Positions whose loss or entropy is not finite: where something has probability 0, and −inf met 0."""
        seen = [self.values[name] for name in ("loss", "student_entropy", "teacher_entropy") if name in self.values]
        return (~torch.stack(seen).sum(0).isfinite()).nonzero().squeeze(-1)

    def replace(self, where: Tensor, other: Rows) -> None:
        """Put the rows of `other` at the positions `where`."""
        for name, value in other.values.items():
            if name in self.values:
                self.values[name][where] = value.to(self.values[name].dtype)
        self.scale[where] = other.scale

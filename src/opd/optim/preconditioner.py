"""A preconditioner for the natural gradient's conjugate gradients, from a few random gradients.

A matrix parameter's block of the Fisher matrix is taken for a Kronecker product, as in K-FAC (Martens and Grosse, arXiv 1503.05671); its two
factors come from the matrix-shaped gradients alone, as in Shampoo (Gupta et al., arXiv 1802.09568). Nothing is remembered from one step
to the next. It changes how fast the iterations get to the solution, not which solution that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

LARGEST_SIDE = 1024
"""Longer sides (a vocabulary) have the diagonal of their factor only: the eigenvectors of a full one cost its length cubed."""


class Kronecker:
    """r ↦ P⁻¹ r, where P, for a matrix parameter, is A ⊗ B / tr A + damping·I with A = E[V Vᵀ] and B = E[Vᵀ V] over the samples V,
    and for any other its diagonal E[v²] + damping. `samples` have mean 0 and the Fisher matrix for their covariance."""

    def __init__(self, samples: Sequence[Sequence[Tensor]], damping: float) -> None:
        self._blocks = [
            _Matrix.of(torch.stack(parts), damping)
            if parts[0].dim() == 2
            else _Diagonal.of(torch.stack(parts), damping)
            for parts in zip(*samples, strict=True)
        ]

    def __call__(self, vector: Float[Tensor, " parameters"]) -> Float[Tensor, " parameters"]:
        parts = vector.split([block.values.numel() for block in self._blocks])
        return torch.cat([block.solve(part).flatten() for block, part in zip(self._blocks, parts, strict=True)])


@dataclass(frozen=True)
class _Diagonal:
    values: Tensor

    @classmethod
    def of(cls, samples: Tensor, damping: float) -> _Diagonal:
        return cls(_positive(samples.square().mean(0) + damping))

    def solve(self, part: Tensor) -> Tensor:
        return part.view_as(self.values) / self.values


@dataclass(frozen=True)
class _Matrix:
    """In the eigenvectors of both factors, where P is diagonal."""

    values: Float[Tensor, "rows columns"]
    left: Float[Tensor, "rows rows"] | None
    right: Float[Tensor, "columns columns"] | None

    @classmethod
    def of(cls, samples: Float[Tensor, "samples rows columns"], damping: float) -> _Matrix:
        along_rows, left = _factor(samples)
        along_columns, right = _factor(samples.mT)
        values = torch.outer(along_rows, along_columns) / _positive(along_rows.sum())
        return cls(_positive(values + damping), left, right)

    def solve(self, part: Tensor) -> Tensor:
        turned = part.view_as(self.values)
        turned = turned if self.left is None else self.left.T @ turned
        turned = turned if self.right is None else turned @ self.right
        turned = turned / self.values
        turned = turned if self.left is None else self.left @ turned
        return turned if self.right is None else turned @ self.right.T


def _factor(samples: Float[Tensor, "samples rows columns"]) -> tuple[Float[Tensor, " rows"], Tensor | None]:
    """Eigenvalues and eigenvectors of E[V Vᵀ], or its diagonal and None."""
    if samples.shape[1] > LARGEST_SIDE:
        return samples.square().sum(-1).mean(0), None
    found = torch.linalg.eigh((samples @ samples.mT).mean(0))
    return found.eigenvalues.clamp_min(0), found.eigenvectors


def _positive(values: Tensor) -> Tensor:
    """A parameter that no sample moved, without damping, is left to the other directions."""
    return values.clamp_min(torch.finfo(values.dtype).tiny)

"""The row pass of losses without a closed form: any objective through `losses` and autograd, exact, a few whole rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from opd.kernels.full_logits import loss_by_autograd
from opd.kernels.spec import RowResults, RowSpec, Teachers


class AutogradRows:
    """Any loss."""

    fill = -torch.inf
    makes_diagnostics = False

    def __init__(self, rows: RowSpec, logits: Tensor) -> None:
        pass

    def __call__(
        self, rows: RowSpec, z: Tensor, teachers: Teachers, *, gradient: bool, room: Tensor | None = None
    ) -> RowResults:
        return loss_by_autograd(rows, z, teachers, gradient=gradient)

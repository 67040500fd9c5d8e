"""Triton between the library's matrix products: per row one kernel for the statistics and one for the gradient, in place."""

from __future__ import annotations

from typing import get_args

from opd.kernels.rows.triton.rows import TritonRows, log_prob_gradient, log_prob_of_rows, multiply
from opd.kernels.spec import RowSpec
from opd.losses import Divergence

__all__ = ["TritonRows", "has_kernels", "log_prob_gradient", "log_prob_of_rows", "multiply"]


def has_kernels(rows: RowSpec) -> bool:
    """True if the loss has row kernels, which know every divergence."""
    return rows.fits(get_args(Divergence))

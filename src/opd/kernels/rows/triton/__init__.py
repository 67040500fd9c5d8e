"""Triton between the library's matrix products: per row one kernel for the statistics and one for the gradient, in place."""

from __future__ import annotations

from opd.kernels.row_spec import RowSpec, target_has_logits
from opd.kernels.rows.triton.rows import TritonRows

__all__ = ["TritonRows", "has_kernels"]


def has_kernels(rows: RowSpec) -> bool:
    """True if the loss has row kernels; otherwise `losses` and autograd do a few rows at a time."""
    objective = rows.objective
    if rows.target is None:
        return True
    if not target_has_logits(rows.target):
        return objective.baseline == "none"
    return objective.support == "full" and objective.teacher_logp_floor is None

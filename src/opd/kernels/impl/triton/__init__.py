"""Triton between the library's matrix products: per row one kernel for the statistics and one for the gradient, in place."""

from __future__ import annotations

from opd.errors import ObjectiveError
from opd.kernels.generic import ByAutograd
from opd.kernels.impl.triton.kernels import INTERPRETED
from opd.kernels.impl.triton.rows import RowKernels
from opd.kernels.request import Answer, Request, target_has_logits
from opd.kernels.walk import walk


def run(request: Request) -> Answer:
    """The request's loss and gradients."""
    if not (request.hidden.is_cuda or INTERPRETED):
        raise ObjectiveError(
            "TRITON_INTERPRET=1 came too late: the kernels have been compiled for CUDA in this process; set it before the first import of "
            "opd.kernels.impl.triton."
        )
    if not has_kernels(request):
        return walk(request, lambda rows: ByAutograd(request))
    return walk(request, lambda rows: RowKernels(request))


def has_kernels(request: Request) -> bool:
    """Whether the loss has row kernels; otherwise `losses` and autograd do a few rows at a time."""
    objective = request.objective
    if request.target is None:
        return True
    if not target_has_logits(request.target):
        return objective.baseline == "none"
    return objective.support == "full" and objective.teacher_logp_floor is None

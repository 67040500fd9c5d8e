"""How fast: any loss of `opd.losses` from hidden states and output layers, without the [tokens, vocab] matrix."""

from __future__ import annotations

from opd.kernels.api import LinearLoss, linear_divergence, linear_objective
from opd.kernels.log_prob import linear_log_prob
from opd.kernels.request import Impl, Memory, PolicyTerm, TeacherMixture
from opd.kernels.teacher_rows import linear_logits, linear_top_k, top_k_of

__all__ = [
    "Impl",
    "LinearLoss",
    "Memory",
    "PolicyTerm",
    "TeacherMixture",
    "linear_divergence",
    "linear_log_prob",
    "linear_logits",
    "linear_objective",
    "linear_top_k",
    "top_k_of",
]

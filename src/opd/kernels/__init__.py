"""Fused losses: any loss of `opd.losses` from hidden states and output layers, without the [tokens, vocab] matrix."""

from __future__ import annotations

from opd.kernels.api import Impl, LinearLoss, linear_divergence, linear_objective
from opd.kernels.full_logits import objective_from_logits
from opd.kernels.log_prob import linear_log_prob
from opd.kernels.spec import Memory, PolicyTerm
from opd.kernels.teacher_rows import linear_logits, linear_top_k, top_k_of
from opd.kernels.views import linear_views, views_from_logits
from opd.types import TeacherMixture

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
    "linear_views",
    "objective_from_logits",
    "top_k_of",
    "views_from_logits",
]

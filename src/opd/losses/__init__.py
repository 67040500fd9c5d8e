"""Distillation losses as pure functions, one number per token. They need torch and nothing else; their settings do without it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd.losses.choices import DEFAULT_TOP_K, Divergence, Reduction, Tail
    from opd.losses.diagnostics import dense_diagnostics, student_diagnostics, token_diagnostics, top_k_diagnostics
    from opd.losses.divergences import (
        alpha_beta_divergence,
        entropy,
        entry_terms,
        forward_kl,
        forward_reverse_kl,
        full_divergence,
        generalized_jsd,
        log_mixture_ratio,
        mass_coefficient,
        reverse_kl,
        skew_forward_kl,
        skew_reverse_kl,
        to_logp,
        total_variation,
    )
    from opd.losses.hybrid import (
        NO_SPREAD,
        Hybrid,
        HybridSchedule,
        as_hybrid,
        combine_advantages,
        group_relative_advantage,
        leave_one_out_advantage,
        match_scale,
    )
    from opd.losses.mixtures import Mixture, mix_losses, mix_teachers, route
    from opd.losses.objective import Objective, TokenLoss
    from opd.losses.partial import (
        SampledToken,
        Support,
        gather_logp,
        likeliest,
        overlap,
        overlap_size,
        partial_divergence,
        support_of,
        tail_logp,
        top_k_support,
        top_overlap,
        union_support,
    )
    from opd.losses.reduce import token_weights, weighted_sum
    from opd.losses.sampled import (
        discounted_return,
        distillation_advantage,
        k1,
        k2,
        k3,
        policy_gradient_loss,
        value_baseline,
    )
    from opd.losses.targets import dense_from_hidden
    from opd.losses.weights import WEIGHT_SUM_TOLERANCE, Combine, Scale, Schedule, linear_schedule

__all__ = [
    "DEFAULT_TOP_K",
    "NO_SPREAD",
    "WEIGHT_SUM_TOLERANCE",
    "Combine",
    "Divergence",
    "Hybrid",
    "HybridSchedule",
    "Mixture",
    "Objective",
    "Reduction",
    "SampledToken",
    "Scale",
    "Schedule",
    "Support",
    "Tail",
    "TokenLoss",
    "alpha_beta_divergence",
    "as_hybrid",
    "combine_advantages",
    "dense_diagnostics",
    "dense_from_hidden",
    "discounted_return",
    "distillation_advantage",
    "entropy",
    "entry_terms",
    "forward_kl",
    "forward_reverse_kl",
    "full_divergence",
    "gather_logp",
    "generalized_jsd",
    "group_relative_advantage",
    "k1",
    "k2",
    "k3",
    "leave_one_out_advantage",
    "likeliest",
    "linear_schedule",
    "log_mixture_ratio",
    "mass_coefficient",
    "match_scale",
    "mix_losses",
    "mix_teachers",
    "overlap",
    "overlap_size",
    "partial_divergence",
    "policy_gradient_loss",
    "reverse_kl",
    "route",
    "skew_forward_kl",
    "skew_reverse_kl",
    "student_diagnostics",
    "support_of",
    "tail_logp",
    "to_logp",
    "token_diagnostics",
    "token_weights",
    "top_k_diagnostics",
    "top_k_support",
    "top_overlap",
    "total_variation",
    "union_support",
    "value_baseline",
    "weighted_sum",
]

_HOMES = {
    "opd.losses.choices": (
        "DEFAULT_TOP_K",
        "Divergence",
        "Reduction",
        "Tail",
    ),
    "opd.losses.diagnostics": (
        "dense_diagnostics",
        "student_diagnostics",
        "token_diagnostics",
        "top_k_diagnostics",
    ),
    "opd.losses.divergences": (
        "alpha_beta_divergence",
        "entropy",
        "entry_terms",
        "forward_kl",
        "forward_reverse_kl",
        "full_divergence",
        "generalized_jsd",
        "log_mixture_ratio",
        "mass_coefficient",
        "reverse_kl",
        "skew_forward_kl",
        "skew_reverse_kl",
        "to_logp",
        "total_variation",
    ),
    "opd.losses.hybrid": (
        "Hybrid",
        "HybridSchedule",
        "NO_SPREAD",
        "as_hybrid",
        "combine_advantages",
        "group_relative_advantage",
        "leave_one_out_advantage",
        "match_scale",
    ),
    "opd.losses.mixtures": (
        "Mixture",
        "mix_losses",
        "mix_teachers",
        "route",
    ),
    "opd.losses.objective": (
        "Objective",
        "TokenLoss",
    ),
    "opd.losses.partial": (
        "SampledToken",
        "Support",
        "gather_logp",
        "likeliest",
        "overlap",
        "overlap_size",
        "partial_divergence",
        "support_of",
        "tail_logp",
        "top_k_support",
        "top_overlap",
        "union_support",
    ),
    "opd.losses.reduce": (
        "token_weights",
        "weighted_sum",
    ),
    "opd.losses.sampled": (
        "discounted_return",
        "distillation_advantage",
        "k1",
        "k2",
        "k3",
        "policy_gradient_loss",
        "value_baseline",
    ),
    "opd.losses.targets": ("dense_from_hidden",),
    "opd.losses.weights": (
        "Combine",
        "Scale",
        "Schedule",
        "WEIGHT_SUM_TOLERANCE",
        "linear_schedule",
    ),
}
"""Names by their module. They are imported on first use, so that the settings of a loss can be had without torch."""
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)

"""The words that choose a loss, and the rules of its shape parameters. Imports no torch, so that a recipe is checked without it."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, get_args

from opd.errors import ObjectiveError

Divergence = Literal[
    "forward_kl",
    "reverse_kl",
    "generalized_jsd",
    "skew_reverse_kl",
    "skew_forward_kl",
    "alpha_beta_divergence",
    "forward_reverse_kl",
    "total_variation",
]

Tail = Literal["bucket", "generalized", "renormalize", "sampled"]
Reduction = Literal["token_mean", "sequence_mean", "fixed"]
VocabularySupport = Literal["full", "teacher_top_k", "student_top_k", "union", "sampled"]
Estimator = Literal["exact", "k1", "k2", "k3"]
Delivery = Literal["loss", "advantage"]
Baseline = Literal["none", "value"]

CHOICES: dict[str, tuple[str, ...]] = {
    "divergence": get_args(Divergence),
    "support": get_args(VocabularySupport),
    "tail": get_args(Tail),
    "estimator": get_args(Estimator),
    "delivery": get_args(Delivery),
    "baseline": get_args(Baseline),
    "reduction": get_args(Reduction),
}
TOP_K_SUPPORTS = ("teacher_top_k", "student_top_k", "union")
DEFAULT_TOP_K = 64
MIXTURES = ("generalized_jsd", "skew_reverse_kl", "skew_forward_kl")  # divergences to M = βT + (1−β)S
READ_BY: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "beta": (0.5, "divergence", (*MIXTURES, "alpha_beta_divergence")),
    "alpha": (0.5, "divergence", ("alpha_beta_divergence", "forward_reverse_kl")),
    "normalize": (True, "divergence", ("generalized_jsd",)),
    "top_k": (DEFAULT_TOP_K, "support", TOP_K_SUPPORTS),
    "tail": ("bucket", "support", TOP_K_SUPPORTS),
}
"""Settings that some choices read: the value that None stands for there, the setting that decides, and its choices."""

UNNORMALIZED_BETA = (0.1, 0.9)  # outside it the published JSD keeps under a tenth of the gradient of the KL it tends to


def warn_if_faded(beta: float) -> None:
    """Warn that the published JSD hardly teaches at this β."""
    low, high = UNNORMALIZED_BETA
    if not low <= beta <= high:
        warnings.warn(
            f"generalized_jsd with normalize=False and beta={beta}: its gradient goes to 0 as beta nears 0 or 1, and jumps to "
            "that of a KL at exactly 0 and 1. Use normalize=True, where beta is a direction only.",
            stacklevel=3,
        )


def check_shape_parameters(name: Divergence, *, alpha: float = 0.5, beta: float = 0.5) -> None:
    """Raise ObjectiveError where α or β leave the region in which `name` is a divergence."""
    if name == "alpha_beta_divergence":
        if not (math.isfinite(alpha) and math.isfinite(beta) and alpha >= 0.0 and beta >= 0.0 and alpha + beta > 0.0):
            raise ObjectiveError(
                f"alpha_beta_divergence needs finite alpha ≥ 0 and beta ≥ 0, not both 0, but got alpha={alpha}, beta={beta}: "
                "a negative power of a probability near 0 is unbounded. Use (1, 0) for forward KL, (0, 1) for reverse KL."
            )
    elif name == "forward_reverse_kl" and not 0.0 <= alpha <= 1.0:
        raise ObjectiveError(
            f"forward_reverse_kl needs 0 ≤ alpha ≤ 1, because alpha·forward KL + (1−alpha)·reverse KL would reward one of the two "
            f"distances, but got alpha={alpha}."
        )
    elif name in ("generalized_jsd", "skew_reverse_kl", "skew_forward_kl") and not 0.0 <= beta <= 1.0:
        raise ObjectiveError(
            f"{name} needs 0 ≤ beta ≤ 1, because M = beta·T + (1−beta)·S is a mixture, but got beta={beta}."
        )

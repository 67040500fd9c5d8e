"""The patch's objectives: divergences over the whole vocabulary. They stand in for `opd.losses.Objective`, which has more to offer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from opd.errors import ObjectiveError
from opd.losses._shapes import Float, Int
from opd.losses.diagnostics import dense_diagnostics
from opd.losses.divergences import Divergence, check_shape_parameters, full_divergence, to_logp, warn_if_faded
from opd.types import DenseTarget

DIVERGENCES = ("reverse_kl", "forward_kl", "generalized_jsd", "skew_reverse_kl")
READ_BETA = ("generalized_jsd", "skew_reverse_kl")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A divergence of the student S from the teacher T. Raises ObjectiveError for settings that cannot work."""

    divergence: Divergence = "reverse_kl"
    beta: float = 0.5
    """Weight of the teacher in the mixture of generalized_jsd and skew_reverse_kl."""
    normalize: bool = True
    """Divide generalized_jsd by β(1−β), which makes β a direction; False is the published form."""
    student_temperature: float = 1.0
    """Student logits are divided by this before the divergence; not the sampling temperature."""
    teacher_temperature: float = 1.0
    scale_by_t2: bool = False
    support: ClassVar[str] = "full"
    baseline: ClassVar[str] = "none"
    teacher_logp_floor: ClassVar[None] = None
    top_k: ClassVar[int] = 64

    def __post_init__(self) -> None:
        for complaint in self._complaints():
            raise ObjectiveError(complaint)
        check_shape_parameters(self.divergence, beta=self.beta)
        if self.divergence == "generalized_jsd" and not self.normalize:
            warn_if_faded(self.beta)

    def _complaints(self) -> Iterator[str]:
        if self.divergence not in DIVERGENCES:
            yield f"divergence={self.divergence!r} is not known; use one of {', '.join(DIVERGENCES)}."
        for name in ("beta", "student_temperature", "teacher_temperature"):
            value = getattr(self, name)
            if not math.isfinite(value) or (name != "beta" and value <= 0):
                yield f"{name}={value} must be a finite number{'' if name == 'beta' else ' > 0, because logits are divided by it'}."
        if self.divergence == "skew_reverse_kl" and self.beta == 0:
            yield "skew_reverse_kl with beta=0 is KL(S‖S), identically 0; use beta=1 for reverse KL, or anything between."

    @property
    def shape(self) -> tuple[float, float, bool]:
        """(α, β, normalize) of the divergence."""
        return 0.5, self.beta, self.normalize

    def per_token_loss(
        self, student_logits: Float[Tensor, "tokens vocab"], target: DenseTarget, _ids: Tensor, **_given: Any
    ) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
        """The divergence of every token in nats, differentiable, and 0 for the teacher's log-probs that a floor would raise."""
        logp, logq = to_logp(student_logits, self.student_temperature), to_logp(target.logits, self.teacher_temperature)
        loss = full_divergence(self.divergence, logp, logq, beta=self.beta, normalize=self.normalize)
        return loss, torch.zeros(len(loss), device=loss.device)


@torch.no_grad()
def token_diagnostics(
    student_logp: Float[Tensor, "tokens vocab"], target: DenseTarget, response_ids: Int[Tensor, " tokens"], top_k: int
) -> dict[str, Float[Tensor, " tokens"]]:
    """Both KLs, both entropies, the response token's log-probs and the overlap of the likeliest tokens, at temperature 1."""
    return dense_diagnostics(student_logp, to_logp(target.logits), response_ids, top_k)

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
READ_BY = {"beta": (0.5, ("generalized_jsd", "skew_reverse_kl")), "normalize": (True, ("generalized_jsd",))}
"""Settings that some divergences read: the value that None stands for there, and these divergences."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A divergence of the student S from the teacher T. Raises ObjectiveError for settings that cannot work."""

    divergence: Divergence = "reverse_kl"
    beta: float | None = None
    """Weight of the teacher in the mixture of generalized_jsd and skew_reverse_kl; 0.5 if not set."""
    normalize: bool | None = None
    """Divide generalized_jsd by β(1−β), which makes β a direction; False is the published form. True if not set."""
    student_temperature: float = 1.0
    """Student logits are divided by this before the divergence; not the sampling temperature."""
    teacher_temperature: float = 1.0
    scale_by_t2: bool = False
    support: ClassVar[str] = "full"
    baseline: ClassVar[str] = "none"
    teacher_logp_floor: ClassVar[None] = None
    token_clip: ClassVar[None] = None
    top_k: ClassVar[int] = 64
    eos_groups: ClassVar[tuple[tuple[int, ...], ...]] = ()

    def __post_init__(self) -> None:
        for name, (default, readers) in READ_BY.items():
            if getattr(self, name) is None and self.divergence in readers:
                object.__setattr__(self, name, default)
        for complaint in self._complaints():
            raise ObjectiveError(complaint)
        _, beta, normalize = self.shape
        check_shape_parameters(self.divergence, beta=beta)
        if self.divergence == "generalized_jsd" and not normalize:
            warn_if_faded(beta)

    def _complaints(self) -> Iterator[str]:
        if self.divergence not in DIVERGENCES:
            yield f"divergence={self.divergence!r} is not known; use one of {', '.join(DIVERGENCES)}."
        for name, (_, readers) in READ_BY.items():
            if getattr(self, name) is not None and self.divergence not in readers:
                yield f"{name}={getattr(self, name)} is not read by {self.divergence}; drop it, or use {' or '.join(readers)}."
        if not math.isfinite(self.beta or 0.0):
            yield f"beta={self.beta} must be a finite number."
        for name in ("student_temperature", "teacher_temperature"):
            value = getattr(self, name)
            if not math.isfinite(value) or value <= 0:
                yield f"{name}={value} must be a finite number > 0, because logits are divided by it."
        if self.divergence == "skew_reverse_kl" and self.beta == 0:
            yield "skew_reverse_kl with beta=0 is KL(S‖S), identically 0; use beta=1 for reverse KL, or anything between."

    @property
    def shape(self) -> tuple[float, float, bool]:
        """(α, β, normalize) of the divergence; 0 and False where it reads none."""
        return 0.0, self.beta or 0.0, bool(self.normalize)

    def per_token_loss(
        self, student_logits: Float[Tensor, "tokens vocab"], target: DenseTarget, _ids: Tensor, **_given: Any
    ) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
        """The divergence of every token in nats, differentiable, and 0 for the teacher's log-probs that a floor would raise."""
        logp, logq = to_logp(student_logits, self.student_temperature), to_logp(target.logits, self.teacher_temperature)
        _, beta, normalize = self.shape
        loss = full_divergence(self.divergence, logp, logq, beta=beta, normalize=normalize)
        return loss, torch.zeros(len(loss), device=loss.device)


@torch.no_grad()
def token_diagnostics(
    student_logp: Float[Tensor, "tokens vocab"], target: DenseTarget, response_ids: Int[Tensor, " tokens"], top_k: int
) -> dict[str, Float[Tensor, " tokens"]]:
    """Both KLs, both entropies, the response token's log-probs and the overlap of the likeliest tokens, at temperature 1."""
    return dense_diagnostics(student_logp, to_logp(target.logits), response_ids, top_k)

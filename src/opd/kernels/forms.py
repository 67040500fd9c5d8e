"""The closed forms: for each divergence D(p) its value and f = ∂D/∂p, from which dD/dz = p (f − Σ p f).

All are written for unnormalised p̃ = e^z = S p and q̃ = e^t = Q q, so that nothing is divided by a row's sum entry by entry; with
z and t already log-probs, S = Q = 1. M = βq + (1−β)p.

    reverse_kl          f = log(p/q)
    forward_kl          p f = −q
    generalized_jsd     f = log(p/M), times 1/β normalised, times 1−β as published
    skew_reverse_kl     f = log(p/M) − (1−β) p/M
    skew_forward_kl     f = −(1−β) q/M
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd.kernels.request import Request, select_policy, target_has_logits
from opd.kernels.terms import policy_loss

CLOSED_FORMS = ("reverse_kl", "forward_kl", "generalized_jsd", "skew_reverse_kl", "skew_forward_kl")
GRAM_ROWS = 4  # (benchmarks/LOG.md)


def has_closed_form(request: Request) -> bool:
    """Whether the loss has a row pass of its own; otherwise `losses` and autograd do a few rows at a time."""
    objective = request.objective
    if request.target is None:
        return True
    if target_has_logits(request.target):
        full = objective.support == "full" and objective.teacher_logp_floor is None
        return full and objective.divergence in CLOSED_FORMS
    return objective.baseline == "none"


def kind_of(request: Request) -> str:
    """The divergence whose form applies: the ends of the β dial are KLs, and a mixture of one model could underflow."""
    name, beta = request.objective.divergence, request.objective.beta
    ends = {
        ("generalized_jsd", 0.0): "forward_kl",
        ("generalized_jsd", 1.0): "reverse_kl",
        ("skew_reverse_kl", 1.0): "reverse_kl",
        ("skew_forward_kl", 0.0): "forward_kl",
    }
    return ends.get((name, float(beta)), name)


class Form:
    """One divergence, and buffers for its passes that are made once."""

    def __init__(self, request: Request) -> None:
        self.kind, self.beta = kind_of(request), request.objective.beta
        self.normalize = request.objective.normalize
        self.request = request
        self.mixes = self.kind not in ("reverse_kl", "forward_kl")
        """f depends on the rows' sums, which must be known first."""
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, like: Tensor) -> Tensor:
        """Scratch of this shape; its content is whatever was left there."""
        held = self._buffers.get(name)
        if held is None or held.shape[0] < like.shape[0] or held.shape[1] != like.shape[1]:
            held = self._buffers[name] = torch.empty_like(like)
        return held if held.shape[0] == like.shape[0] else held[: like.shape[0]]

    def slope(self, z: Tensor, t: Tensor, p: Tensor, q_: Tensor, s: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f over `factor` into z, and Σ p̃ log(p/M), Σ q̃ log(q/M) up to what `divergence` puts right, and Σ p̃ f. t is used up."""
        if self.kind == "reverse_kl":
            x = dot(p, z.sub_(t))
            return x, x, x
        none = torch.zeros_like(s)
        if self.kind == "forward_kl":
            return none, dot(q_, t.sub_(z)), none
        m, share = self._log_mixture(z, p, q_, s, q)
        y = dot(q_, t.sub_(m)) if self.kind != "skew_reverse_kl" else none
        x = dot(p, z.sub_(m)) if self.kind != "skew_forward_kl" else none
        if share is None:
            return x, y, x
        self._add_share(z, share)
        return x, y, dot(p, z)

    def slope_alone(self, z: Tensor, t: Tensor, p: Tensor, q_: Tensor) -> None:
        """f over `factor` into z, from log-probs (S = Q = 1) whose sums are known already."""
        if self.kind == "reverse_kl":
            z.sub_(t)
        elif self.kind != "forward_kl":
            one = torch.ones_like(p[:, :1])
            m, share = self._log_mixture(z, p, q_, one, one)
            z.sub_(m)
            if share is not None:
                self._add_share(z, share)

    def _log_mixture(self, z: Tensor, p: Tensor, q_: Tensor, s: Tensor, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """log S M, and p/M or q/M times S/Q where f has it."""
        m = torch.mul(q_, self.beta * s / q, out=self.buffer("m", z)).add_(p, alpha=1.0 - self.beta)
        m.clamp_min_(torch.finfo(m.dtype).tiny)
        share = None
        if self.kind != "generalized_jsd":
            share = torch.div(p if self.kind == "skew_reverse_kl" else q_, m, out=self.buffer("share", z))
        return m.log_(), share

    def _add_share(self, z: Tensor, share: Tensor) -> None:
        if self.kind == "skew_reverse_kl":
            z.sub_(share, alpha=1.0 - self.beta)
        else:
            torch.neg(share, out=z)

    def factor(self, s: Tensor, q: Tensor) -> Tensor | float:
        """What `slope` leaves out of f."""
        if self.kind == "generalized_jsd":
            return 1.0 / self.beta if self.normalize else 1.0 - self.beta
        return (1.0 - self.beta) * s / q if self.kind == "skew_forward_kl" else 1.0

    def divergence(self, x: Tensor, y: Tensor, s: Tensor, q: Tensor) -> Tensor:
        """D from `slope`'s sums. x / S and y / Q − log Q + log S are KL(S‖M) and KL(T‖M); for the KLs, M is the other model."""
        log_s_over_q = s.log() - q.log()
        student_to_m, teacher_to_m = x / s, y / q + log_s_over_q
        beta = self.beta
        if self.kind == "reverse_kl":
            return student_to_m - log_s_over_q
        if self.kind in ("forward_kl", "skew_forward_kl"):
            return teacher_to_m
        if self.kind == "skew_reverse_kl":
            return student_to_m
        if self.normalize:
            return teacher_to_m / (1.0 - beta) + student_to_m / beta
        return beta * teacher_to_m + (1.0 - beta) * student_to_m

    def finish(self, z: Tensor, p: Tensor, q_: Tensor, s: Tensor, q: Tensor, center: Tensor) -> None:
        """S p (f − center) in place of f, over `factor`; q̃ is used up."""
        if self.kind == "forward_kl":
            torch.sub(p, q_.mul_(s / q), out=z)
        else:
            z.sub_(center).mul_(p)

    def finish_with_extras(
        self,
        z: Tensor,
        p: Tensor,
        q_: Tensor,
        s: Tensor,
        q: Tensor,
        center: Tensor,
        weight: float,
        index: Tensor,
        parts: tuple[Tensor | None, Tensor, Tensor],
    ) -> Tensor | None:
        """`finish`, with the policy term and the entropy bonus, all divided by weight · factor. Returns what is to be added at the
        response tokens. `parts` are a copy of the logits (None without a bonus), the response tokens' log-probs, and Σ p z."""
        bonus, y_logp, mean_z = parts
        weight = weight * self.factor(s, q)  # pyright: ignore[reportAssignmentType]
        policy = select_policy(self.request.policy, index)
        slope = None
        if policy is not None:
            slope = policy_loss(policy, y_logp.squeeze(-1))[1].unsqueeze(-1) / weight
            center = center + slope
        if self.kind == "forward_kl":
            z.zero_()
            center = center - 1.0
        if bonus is not None:
            share = self.request.entropy_bonus / weight
            z.add_(bonus.mul_(share))
            center = center + share * mean_z
        z.sub_(center).mul_(p)
        if self.kind == "forward_kl":
            z.sub_(q_.mul_(s / q))
        return None if slope is None else slope * s


def with_extras(request: Request, values: dict[str, Tensor], total: Tensor, index: Tensor) -> dict[str, Tensor]:
    """`values` with the loss: `total` and the policy and entropy terms of the rows `index`."""
    policy = select_policy(request.policy, index)
    if policy is not None:
        values["policy_loss"], _, values["clipped"] = policy_loss(policy, values["student_logp"])
        total = total + values["policy_loss"]
    if request.entropy_bonus:
        total = total - request.entropy_bonus * values["student_entropy"]
    return {**values, "loss": total}


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ a b of each row, [rows, 1]. Of a few long rows, the diagonal of a b.T is had at half the time of a product and a sum."""
    if a.shape[0] == 1:
        return torch.dot(a[0], b[0]).view(1, 1)
    if a.shape[0] <= GRAM_ROWS and not a.is_cuda:
        return torch.mm(a, b.T).diagonal().unsqueeze(-1)
    return torch.linalg.vecdot(a, b).unsqueeze(-1)

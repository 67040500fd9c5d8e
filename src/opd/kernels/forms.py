"""The closed forms: for each divergence D(p) its value and f = ∂D/∂p, from which dD/dz = p (f − Σ p f).

All are written for unnormalised p̃ = e^z = S p and q̃ = e^t = Q q, so that nothing is divided by a row's sum entry by entry; with
z and t already log-probs, S = Q = 1. M = βq + (1−β)p.

    reverse_kl          f = log(p/q)
    forward_kl          p f = −q
    generalized_jsd     f = log(p/M), times 1/β normalised, times 1−β as published
    skew_reverse_kl     f = log(p/M) + (1−β) (M−p)/M
    skew_forward_kl     f = −(1−β) (q−M)/M

log M is never formed: near β = 0 and 1 it is all but one model's log-prob, and the division by β or 1−β magnifies what it lost. With
d = log q − log p and w the smaller of the two weights, log(M/p) or log(M/q) is log1p(w (e^±d − 1)), and the other is d away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd.kernels.request import Request, select_policy, target_has_logits
from opd.kernels.terms import policy_loss

GRAM_ROWS, GRAM_COLUMNS = 4, 1 << 15  # (benchmarks/LOG.md)
CLOSED_FORMS = ("reverse_kl", "forward_kl", "generalized_jsd", "skew_reverse_kl", "skew_forward_kl")
MAX_LOG_RATIO = (
    80.0  # |d| from which on one model has no part in M: e^80 ≈ 6e34 and its inverse are normal float32 numbers
)


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
    name, (_, beta, _) = request.objective.divergence, request.objective.shape
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
        _, self.beta, self.normalize = request.objective.shape
        self.kind, self.rest = kind_of(request), 1.0 - self.beta
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
        """f over `factor` into z, S KL(S‖M) and Q KL(T‖M) where the divergence has them, and Σ p̃ f. t is used up.

        For the KLs, M is the other model, and `divergence` puts the normalisers right.
        """
        if self.kind == "reverse_kl":
            x = dot(p, z.sub_(t))
            return x, x, x
        none = torch.zeros_like(s)
        if self.kind == "forward_kl":
            return none, dot(q_, t.sub_(z)), none
        if self.kind == "generalized_jsd":
            x, y = self.mixture_sums(z, t, p, q_, q / s)
            return x, y, -x
        over = self._skewed(z, t, q / s)
        mixture = torch.mul(q_, self.beta * s / q, out=self.buffer("share", z)).add_(p, alpha=self.rest)
        mass = dot(z, mixture)  # of q − p: 0, but for what rounding did to d, of which it takes out the first order
        if self.kind == "skew_reverse_kl":
            x, y = self.beta * mass - dot(p, over), none
        else:
            x, y = none, -dot(q_, over) - self.rest * (q / s) * mass
        self._skewed_slope(z, over)
        return x, y, dot(p, z)

    def mixture_sums(self, z: Tensor, t: Tensor, p: Tensor, q_: Tensor, q_over_s: Tensor) -> tuple[Tensor, Tensor]:
        """log(M/p) into z, and Σ p̃ log(p/M) and Σ q̃ log(q/M). t is used up."""
        self._smaller_ratio(z, t, q_over_s)
        if self.beta <= 0.5:
            x = dot(p, z)
            return -x, -dot(q_, torch.sub(z, t, out=t))
        y = dot(q_, z)
        return -dot(p, z.add_(t)), -y

    def slope_alone(self, z: Tensor, t: Tensor) -> None:
        """f over `factor` into z, from log-probs (S = Q = 1) whose sums are known already."""
        if self.kind == "reverse_kl":
            z.sub_(t)
        elif self.kind == "generalized_jsd":
            self._smaller_ratio(z, t)
            if self.beta > 0.5:
                z.add_(t)
        elif self.kind != "forward_kl":
            self._skewed_slope(z, self._skewed(z, t))

    def _smaller_ratio(self, z: Tensor, t: Tensor, q_over_s: Tensor | None = None) -> None:
        """d into t, and into z log(M/p) where β ≤ ½, else log(M/q)."""
        self._log_ratio(z, t, q_over_s)
        if self.beta <= 0.5:
            torch.expm1(t, out=z).mul_(self.beta).log1p_()
        else:
            torch.neg(t, out=z).expm1_().mul_(self.rest).log1p_()

    def _log_ratio(self, z: Tensor, t: Tensor, q_over_s: Tensor | None) -> None:
        """d = log q − log p into t."""
        t.sub_(z)
        if q_over_s is not None:
            t.sub_(q_over_s.log())
        t.clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)

    def _skewed(self, z: Tensor, t: Tensor, q_over_s: Tensor | None = None) -> Tensor:
        """(q − p)/M into z; the log-ratio of M to the model that the divergence weighs with. t is used up."""
        self._log_ratio(z, t, q_over_s)
        teachers = self.beta <= 0.5  # the teacher's weight is the smaller one
        if teachers:
            torch.expm1(t, out=z)
        else:
            torch.neg(t, out=z).expm1_()
        share = torch.mul(z, min(self.beta, self.rest), out=self.buffer("share", z))
        smaller = torch.log1p(share, out=self.buffer("m", z))
        z.div_(share.add_(1.0))
        if not teachers:
            z.neg_()
        if (self.kind == "skew_reverse_kl") == teachers:
            return smaller
        return torch.sub(smaller, t, out=t) if teachers else t.add_(smaller)

    def _skewed_slope(self, z: Tensor, over_p: Tensor) -> None:
        """f over `factor` from (q − p)/M, in z."""
        if self.kind == "skew_reverse_kl":
            z.sub_(over_p, alpha=1.0 / (self.beta * self.rest))

    def factor(self, s: Tensor, q: Tensor) -> Tensor | float:
        """What `slope` leaves out of f."""
        if self.kind == "generalized_jsd":
            return -1.0 / self.beta if self.normalize else -self.rest
        return {"skew_reverse_kl": self.beta * self.rest, "skew_forward_kl": -self.rest * self.rest}.get(self.kind, 1.0)

    def divergence(self, x: Tensor, y: Tensor, s: Tensor, q: Tensor) -> Tensor:
        """D from `slope`'s sums."""
        student_to_m, teacher_to_m = x / s, y / q
        beta = self.beta
        if self.kind == "reverse_kl":
            return student_to_m - (s.log() - q.log())
        if self.kind == "forward_kl":
            return teacher_to_m + (s.log() - q.log())
        if self.kind == "skew_forward_kl":
            return teacher_to_m
        if self.kind == "skew_reverse_kl":
            return student_to_m
        if self.normalize:
            return teacher_to_m / self.rest + student_to_m / beta
        return beta * teacher_to_m + self.rest * student_to_m

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
    """Σ a b of each row, [rows, 1].

    Of a few rows, the diagonal of a b.T is had at half the time of a product and a sum. It adds columns one by one, so that long rows
    are added up in parts: at 152k columns entropies were off by 4e-5 nats.
    """
    if a.is_cuda or a.shape[0] > GRAM_ROWS:
        return torch.linalg.vecdot(a, b).unsqueeze(-1)
    parts = zip(a.split(GRAM_COLUMNS, dim=1), b.split(GRAM_COLUMNS, dim=1), strict=True)
    if a.shape[0] == 1:
        return _sum([torch.dot(x[0], y[0]) for x, y in parts]).view(1, 1)
    return _sum([torch.mm(x, y.T).diagonal() for x, y in parts]).unsqueeze(-1)


def _sum(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

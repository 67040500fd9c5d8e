"""The closed forms: for each divergence D(p) its value and f = ∂D/∂p, from which dD/dz = p (f − Σ p f); and terms of a few tokens.

The divergences are written for unnormalised p̃ = e^z = S p and q̃ = e^t = Q q, so that nothing is divided by a row's sum entry by
entry; with z and t already log-probs, S = Q = 1. M = βq + (1−β)p.

    reverse_kl          f = log(p/q)
    forward_kl          p f = −q
    generalized_jsd     f = log(p/M), times 1/β normalised, times 1−β as published
    skew_reverse_kl     f = log(p/M) + (1−β) (M−p)/M
    skew_forward_kl     f = −(1−β) (q−M)/M

log M is never formed: near β = 0 and 1 it is all but one model's log-prob, and the division by β or 1−β magnifies what it lost. With
d = log q − log p and w the smaller of the two weights, log(M/p) or log(M/q) is log1p(w (e^±d − 1)), and the other is d away.

A term F of a few tokens' log-probs alone has dF/dz = Σ_k F'_k (1[v = k] − p_v): one multiple of p and a few entries. So reinforcement
learning and top-k distillation ride on a row that is in hand anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from opd.kernels.row_spec import PolicyTerm, RowSpec, at, target_has_logits
from opd.losses import Objective, policy_gradient_loss, support_of
from opd.losses._shapes import Bool, Float
from opd.losses.sampled import MAX_LOG_RATIO
from opd.types import SampledTarget, TopKTarget

SAFE_SUM = (1e-10, 1e20)  # far from both ends of float32, so that products of two sums still fit
CPU_PIECE = 1 << 16  # entries of float32: four buffers of 256 KiB stay in a core's second-level cache
GPU_PIECE = 1 << 24  # 64 MiB; autograd keeps about thirty copies of a piece
FEW_ROWS = 128  # what autograd keeps of 64 entries a row is then under a mebibyte
GRAM_ROWS, GRAM_COLUMNS = 4, 1 << 15  # (benchmarks/LOG.md)
MAX_MIXED_RATIO = 80.0  # |d| from which one model has no part in M: e^80 ≈ 6e34 and its inverse are normal in float32
Sums = tuple[Tensor, ...]
Total = Callable[..., Sums]
"""Sums of rows over all shards of the vocabulary."""


class ClosedFormDivergence:
    """One divergence, and scratch for its passes that is made once.

    z, t are logits that may be overwritten, p, q_ their exponentials, s, q the sums of those; columns are [rows, 1].
    """

    mixes = False
    """True if f depends on the rows' sums, which must be known first."""
    subtracts_teacher = False
    """True if p f is −q, which is subtracted instead of multiplied by p."""

    def __init__(self, objective: Objective) -> None:
        _, self.beta, self.normalize = objective.shape
        self.rest = 1.0 - self.beta
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, like: Tensor) -> Tensor:
        """Scratch of this shape; its content is whatever was left there."""
        held = self._buffers.get(name)
        if held is None or held.shape[0] < like.shape[0] or held.shape[1] != like.shape[1]:
            held = self._buffers[name] = torch.empty_like(like)
        return held if held.shape[0] == like.shape[0] else held[: like.shape[0]]

    def grad_wrt_probs(self, z: Tensor, t: Tensor, p: Tensor, q_: Tensor, s: Tensor, q: Tensor) -> Sums:
        """Overwrite z with f / row_scale, and use t up. Returns S KL(S‖M) and Q KL(T‖M) where the divergence has them, and Σ p̃ f.

        For the KLs, M is the other model, and `value` adds the normalisers.
        """
        raise NotImplementedError

    def grad_wrt_probs_of_logp(self, z: Tensor, t: Tensor) -> None:
        """Overwrite z with f / row_scale, from log-probs (S = Q = 1) whose sums are known already."""
        raise NotImplementedError

    def value(self, x: Tensor, y: Tensor, s: Tensor, q: Tensor) -> Tensor:
        """D from the sums of `grad_wrt_probs`."""
        raise NotImplementedError

    def row_scale(self, s: Tensor, q: Tensor) -> Tensor | float:
        """The factor of f, one number per row, that is left to whoever scales rows."""
        return 1.0

    def row_pass(self, z: Tensor, t: Tensor, total: Total, gradient: bool) -> Sums | None:
        """The whole row pass in one buffer (two for the JSD), so that more stays in cache: S, Q, Σ p̃ z, Σ q̃ t and the sums of `value`.

        With `gradient`, S p (f − Σ p f) / row_scale replaces z. None: this divergence has no such pass.
        """
        return None


class ReverseKl(ClosedFormDivergence):
    """KL(S‖T)."""

    def grad_wrt_probs(self, z: Tensor, t: Tensor, p: Tensor, q_: Tensor, s: Tensor, q: Tensor) -> Sums:
        x = dot(p, z.sub_(t))
        return x, x, x

    def grad_wrt_probs_of_logp(self, z: Tensor, t: Tensor) -> None:
        z.sub_(t)

    def value(self, x: Tensor, y: Tensor, s: Tensor, q: Tensor) -> Tensor:
        return x / s - (s.log() - q.log())

    def row_pass(self, z: Tensor, t: Tensor, total: Total, gradient: bool) -> Sums:
        one = torch.exp(t, out=self.buffer("p", z))
        q, tq = one.sum(-1, keepdim=True), dot(one, t)
        p = torch.exp(z, out=one)
        s, zp = p.sum(-1, keepdim=True), dot(p, z)
        s, q, zp, tq, x = total(s, q, zp, tq, dot(p, z.sub_(t)))
        if gradient:
            z.sub_(x / s).mul_(p)
        return s, q, zp, tq, x, torch.zeros_like(q)


class ForwardKl(ClosedFormDivergence):
    """KL(T‖S)."""

    subtracts_teacher = True

    def grad_wrt_probs(self, z: Tensor, t: Tensor, p: Tensor, q_: Tensor, s: Tensor, q: Tensor) -> Sums:
        none = torch.zeros_like(s)
        return none, dot(q_, t.sub_(z)), none

    def grad_wrt_probs_of_logp(self, z: Tensor, t: Tensor) -> None:
        z.zero_()

    def value(self, x: Tensor, y: Tensor, s: Tensor, q: Tensor) -> Tensor:
        return y / q + (s.log() - q.log())

    def row_pass(self, z: Tensor, t: Tensor, total: Total, gradient: bool) -> Sums:
        one = torch.exp(t, out=self.buffer("p", z))
        q, tq = one.sum(-1, keepdim=True), dot(one, t)
        y = dot(one, t.sub_(z))
        p = torch.exp(z, out=t)
        s, q, zp, tq, y = total(p.sum(-1, keepdim=True), q, dot(p, z), tq, y)
        if gradient:
            torch.sub(p, one.mul_(s / q), out=z)
        return s, q, zp, tq, torch.zeros_like(q), y


def _log_ratio(z: Tensor, t: Tensor, q_over_s: Tensor | None) -> None:
    """d = log q − log p into t."""
    t.sub_(z)
    if q_over_s is not None:
        t.sub_(q_over_s.log())
    t.clamp_(-MAX_MIXED_RATIO, MAX_MIXED_RATIO)


class GeneralizedJsd(ClosedFormDivergence):
    """β KL(T‖M) + (1−β) KL(S‖M), divided by β (1−β) when normalised."""

    mixes = True

    def grad_wrt_probs(self, z: Tensor, t: Tensor, p: Tensor, q_: Tensor, s: Tensor, q: Tensor) -> Sums:
        x, y = self._sums(z, t, p, q_, q / s)
        return x, y, -x

    def _sums(self, z: Tensor, t: Tensor, p: Tensor, q_: Tensor, q_over_s: Tensor) -> tuple[Tensor, Tensor]:
        """log(M/p) into z, and Σ p̃ log(p/M) and Σ q̃ log(q/M). t is used up."""
        self._smaller_ratio(z, t, q_over_s)
        if self.beta <= 0.5:
            x = dot(p, z)
            return -x, -dot(q_, torch.sub(z, t, out=t))
        y = dot(q_, z)
        return -dot(p, z.add_(t)), -y

    def grad_wrt_probs_of_logp(self, z: Tensor, t: Tensor) -> None:
        self._smaller_ratio(z, t)
        if self.beta > 0.5:
            z.add_(t)

    def _smaller_ratio(self, z: Tensor, t: Tensor, q_over_s: Tensor | None = None) -> None:
        """d into t, and into z log(M/p) where β ≤ ½, else log(M/q)."""
        _log_ratio(z, t, q_over_s)
        if self.beta <= 0.5:
            torch.expm1(t, out=z).mul_(self.beta).log1p_()
        else:
            torch.neg(t, out=z).expm1_().mul_(self.rest).log1p_()

    def value(self, x: Tensor, y: Tensor, s: Tensor, q: Tensor) -> Tensor:
        if self.normalize:
            return (y / q) / self.rest + (x / s) / self.beta
        return self.beta * (y / q) + self.rest * (x / s)

    def row_scale(self, s: Tensor, q: Tensor) -> float:
        return -1.0 / self.beta if self.normalize else -self.rest

    def row_pass(self, z: Tensor, t: Tensor, total: Total, gradient: bool) -> Sums:
        one = torch.exp(t, out=self.buffer("p", z))
        q, tq = one.sum(-1, keepdim=True), dot(one, t)
        p = torch.exp(z, out=self.buffer("m", z))
        s, zp = p.sum(-1, keepdim=True), dot(p, z)
        s, q, zp, tq = total(s, q, zp, tq)
        x, y = total(*self._sums(z, t, p, one, q / s))
        if gradient:
            z.add_(x / s).mul_(p)
        return s, q, zp, tq, x, y


class Skewed(ClosedFormDivergence):
    """KL(S‖M) or KL(T‖M); f is made of (q − p)/M."""

    mixes = True

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective)
        self.of_student = objective.divergence == "skew_reverse_kl"

    def value(self, x: Tensor, y: Tensor, s: Tensor, q: Tensor) -> Tensor:
        return x / s if self.of_student else y / q

    def row_scale(self, s: Tensor, q: Tensor) -> float:
        return self.beta * self.rest if self.of_student else -self.rest * self.rest

    def grad_wrt_probs(self, z: Tensor, t: Tensor, p: Tensor, q_: Tensor, s: Tensor, q: Tensor) -> Sums:
        over = self._gap(z, t, q / s)
        mixture = torch.mul(q_, self.beta * s / q, out=self.buffer("share", z)).add_(p, alpha=self.rest)
        mass = dot(z, mixture)  # of q − p: 0, but for what rounding did to d, of which it takes out the first order
        none = torch.zeros_like(s)
        if self.of_student:
            x, y = self.beta * mass - dot(p, over), none
            z.sub_(over, alpha=1.0 / (self.beta * self.rest))
        else:
            x, y = none, -dot(q_, over) - self.rest * (q / s) * mass
        return x, y, dot(p, z)

    def grad_wrt_probs_of_logp(self, z: Tensor, t: Tensor) -> None:
        over = self._gap(z, t)
        if self.of_student:
            z.sub_(over, alpha=1.0 / (self.beta * self.rest))

    def _gap(self, z: Tensor, t: Tensor, q_over_s: Tensor | None = None) -> Tensor:
        """(q − p)/M into z; the log-ratio of M to the model that the divergence weighs with. t is used up."""
        _log_ratio(z, t, q_over_s)
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
        if self.of_student == teachers:
            return smaller
        return torch.sub(smaller, t, out=t) if teachers else t.add_(smaller)


CLOSED_FORMS: dict[str, type[ClosedFormDivergence]] = {
    "reverse_kl": ReverseKl,
    "forward_kl": ForwardKl,
    "generalized_jsd": GeneralizedJsd,
    "skew_reverse_kl": Skewed,
    "skew_forward_kl": Skewed,
}


def has_closed_form(rows: RowSpec, divergences: Collection[str] = CLOSED_FORMS) -> bool:
    """True if a row pass made for these divergences has the loss; otherwise `losses` and autograd do a few rows at a time."""
    objective = rows.objective
    if rows.target is None:
        return True
    if not target_has_logits(rows.target):
        return objective.baseline == "none"
    return objective.support == "full" and objective.teacher_logp_floor is None and objective.divergence in divergences


def kind_of(objective: Objective) -> str:
    """The divergence whose form applies: the ends of the β dial are KLs, and a mixture of one model could underflow."""
    name, (_, beta, _) = objective.divergence, objective.shape
    ends = {
        ("generalized_jsd", 0.0): "forward_kl",
        ("generalized_jsd", 1.0): "reverse_kl",
        ("skew_reverse_kl", 1.0): "reverse_kl",
        ("skew_forward_kl", 0.0): "forward_kl",
    }
    return ends.get((name, float(beta)), name)


def closed_form(objective: Objective) -> ClosedFormDivergence:
    """The closed form of an objective's divergence; of a loss that compares no distributions, buffers alone."""
    return CLOSED_FORMS.get(kind_of(objective), ClosedFormDivergence)(objective)


# ---- terms of a few tokens ---------------------------------------------------------------------------------------------


def policy_loss(
    policy: PolicyTerm, student_logp: Float[Tensor, " tokens"]
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """λ_rl · importance · surrogate, its derivative with respect to the response token's log-prob, and 1 where it is clipped."""
    logp = student_logp.detach()
    advantage = policy.advantages.to(logp.dtype)
    old = logp if policy.old_log_prob is None else policy.old_log_prob.to(logp.dtype)
    log_ratio = logp - torch.where(old == -torch.inf, 0.0, old)
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    loss, moves = -ratio * advantage, log_ratio <= MAX_LOG_RATIO
    clipped, clip = torch.zeros_like(moves), policy.clip_range
    if clip is not None:
        low, high = clip if isinstance(clip, tuple) else (clip, clip)
        loss = torch.maximum(loss, -ratio.clamp(1.0 - low, 1.0 + high) * advantage)
        clipped = torch.where(advantage >= 0, ratio > 1.0 + high, ratio < 1.0 - low)
    factor = torch.full_like(logp, policy.weight)
    if policy.importance_weights is not None:
        factor = factor * policy.importance_weights.to(logp.dtype)
    slope = torch.where(moves & ~clipped, -ratio * advantage, 0.0)
    return factor * loss, factor * slope, clipped.to(logp.dtype)


def policy_loss_by_autograd(policy: PolicyTerm, student_logp: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """The same loss through `losses`, differentiable in `student_logp`."""
    loss = policy_gradient_loss(student_logp, policy.advantages, policy.old_log_prob, policy.clip_range)
    if policy.importance_weights is not None:
        loss = policy.importance_weights.detach() * loss
    return policy.weight * loss


def few_tokens_loss(
    rows: RowSpec, student_on_k: Float[Tensor, "tokens k"] | None, student_logp: Float[Tensor, " tokens"] | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """The divergence from a top-k or sampled target, its derivatives with respect to both arguments, and the clamped mass."""
    assert isinstance(rows.target, (TopKTarget, SampledTarget))
    parts = []
    for first in range(0, max(1, len(rows.target)), FEW_ROWS):
        piece = slice(first, first + FEW_ROWS)
        parts.append(_few_rows(rows.at(piece), at(student_on_k, piece), at(student_logp, piece)))
    loss, k_slope, y_slope, clamped = zip(*parts, strict=True)
    joined = [None if column[0] is None else torch.cat(column) for column in (k_slope, y_slope)]  # pyright: ignore[reportArgumentType]
    return torch.cat(loss), joined[0], joined[1], torch.cat(clamped)


def _few_rows(
    rows: RowSpec, student_on_k: Tensor | None, student_logp: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    target, sampler = rows.target, rows.sampler_logp
    leaves = [None if x is None else x.detach().requires_grad_(True) for x in (student_on_k, student_logp)]
    on_k, y_logp = leaves
    with torch.enable_grad():
        if isinstance(target, TopKTarget):
            assert on_k is not None
            support = support_of(target.ids)
            loss, clamped = rows.objective.from_top_k(
                support.mask(on_k), support, target, y_logp, rows.response_ids, sampler
            )
        else:
            assert y_logp is not None and isinstance(target, SampledTarget)
            loss, clamped = rows.objective.from_sampled(y_logp, target.teacher_logp, sampler)
        present = [leaf for leaf in leaves if leaf is not None]
        found = list(torch.autograd.grad(loss.sum(), present, allow_unused=True))
    gradients = [None if leaf is None else found.pop(0) for leaf in leaves]
    return loss.detach().to(present[0].dtype), gradients[0], gradients[1], clamped.detach()


def add_policy_and_entropy(
    rows: RowSpec, values: dict[str, Tensor], distillation: Float[Tensor, " tokens"]
) -> dict[str, Tensor]:
    """`values` with the loss: the distillation term, the policy term and the entropy bonus."""
    total = distillation
    if rows.policy is not None:
        values["policy_loss"], _, values["clipped"] = policy_loss(rows.policy, values["student_logp"])
        total = total + values["policy_loss"]
    if rows.entropy_bonus:
        total = total - rows.entropy_bonus * values["student_entropy"]
    return {**values, "loss": total}


def token_slopes(
    rows: RowSpec, values: dict[str, Tensor], k_slope: Tensor | None, y_slope: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """(ids, derivatives with respect to the student's log-probs of these) [rows, k], of the distillation and the policy term."""
    if rows.policy is not None:
        more = policy_loss(rows.policy, values["student_logp"])[1]
        y_slope = more if y_slope is None else y_slope + more
    adds = [(rows.target.ids, k_slope)] if k_slope is not None and isinstance(rows.target, TopKTarget) else []
    if y_slope is not None and rows.response_ids is not None:
        adds.append((rows.response_ids.unsqueeze(-1), y_slope.unsqueeze(-1)))
    return adds


# ---- sums of rows -----------------------------------------------------------------------------------------------------


def pieces(z: Tensor) -> list[slice]:
    """The rows, some at a time."""
    rows = max(1, (GPU_PIECE if z.is_cuda else CPU_PIECE) // max(1, z.shape[1]))
    return [slice(first, min(first + rows, z.shape[0])) for first in range(0, z.shape[0], rows)]


def out_of_range(sums: Float[Tensor, "rows k"]) -> Bool[Tensor, " rows"]:
    """True where one of a row's sums has left the range; NaN counts as outside."""
    low, high = SAFE_SUM
    return ~((sums > low) & (sums < high)).all(-1)


def log_probs(z: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
    """log softmax(z) by the sums of the fused row pass, so that the same logits give the same bits; by `log_softmax` where they are out
    of range."""
    sums = torch.cat([z.new_empty(0, 1), *(z[piece].exp().sum(-1, keepdim=True) for piece in pieces(z))])
    logp = z - sums.log()
    outside = out_of_range(sums)
    if bool(outside.any()):
        logp[outside] = torch.log_softmax(z[outside], dim=-1)
    return logp


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

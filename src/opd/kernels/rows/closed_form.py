"""PyTorch only: row passes that write the gradient over the logits, a few rows at a time so that they stay in cache.

Each divergence has its value and f = ∂D/∂p, from which dD/dz = p (f − Σ p f). They are written for unnormalised p̃ = e^z = S p and
q̃ = e^t = Q q, so that nothing is divided by a row's sum entry by entry; with z and t already log-probs, S = Q = 1. M = βq + (1−β)p.

    reverse_kl          f = log(p/q)
    forward_kl          p f = −q
    forward_reverse_kl  p f = (1−α) p log(p/q) − α q
    generalized_jsd     f = log(p/M), times 1/β normalised, times 1−β as published
    skew_reverse_kl     f = log(p/M) + (1−β) (M−p)/M
    skew_forward_kl     f = −(1−β) (q−M)/M

log M is never formed: near β = 0 and 1 it is all but one model's log-prob, and the division by β or 1−β magnifies what it lost. With
d = log q − log p and w the smaller of the two weights, log(M/p) or log(M/q) is log1p(w (e^±d − 1)), and the other is d away.

Factors of a whole row (1/S, λ, 1/β) go to the hidden rows (`RowResults.scale`). Logits are not shifted by their maximum as long as the
sums of a row stay in the middle of float32's range; a row where they do not is recomputed by the chunk loop, and from then on logits
are shifted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from opd.kernels.few_tokens import add_few_tokens, policy_loss, token_slopes
from opd.kernels.spec import (
    MASKED,
    RowPass,
    RowResults,
    RowSpec,
    Teachers,
    bounded,
    kind_of,
    out_of_range,
    pieces,
    restore_neg_inf,
)
from opd.losses import Objective, top_overlap
from opd.types import DenseTarget, HiddenTarget, TeacherMixture, TopKTarget

GRAM_ROWS, GRAM_COLUMNS = 4, 1 << 15  # (benchmarks/LOG.md)
MAX_MIXED_RATIO = 80.0  # |d| from which one model has no part in M: e^80 ≈ 6e34 and its inverse are normal in float32
FOLD_SHARE = 1e-3  # a row's multiple of p̃ becomes a divisor only if it is this share of the entries beside it, or more
Sums = tuple[Tensor, ...]


class ClosedFormDivergence:
    """One divergence, and scratch for its passes that is made once.

    z, t are logits that may be overwritten, p, q_ their exponentials, s, q the sums of those; columns are [rows, 1].
    """

    mixes = False
    """True if f depends on the rows' sums, which must be known first."""
    subtracts_teacher = False
    """True if p f is −q alone: nothing is multiplied by p."""
    teacher_share = 0.0
    """The multiple of q in −p f / row_scale, which is subtracted instead of multiplied by p; the rest of f is `grad_wrt_probs`'s."""

    def __init__(self, objective: Objective) -> None:
        self.alpha, self.beta, self.normalize = objective.shape
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

    def center_of_logp(self, center: Tensor, s: Tensor, q: Tensor) -> Tensor:
        """Σ p f / row_scale where z and t are log-probs, from the sum Σ p̃ f of `grad_wrt_probs`."""
        return center / s

    def row_scale(self, s: Tensor, q: Tensor) -> float:
        """The factor of f, one number per row, that is left to whoever scales rows."""
        return 1.0


class ReverseKl(ClosedFormDivergence):
    """KL(S‖T)."""

    def grad_wrt_probs(self, z: Tensor, t: Tensor, p: Tensor, q_: Tensor, s: Tensor, q: Tensor) -> Sums:
        x = dot(p, z.sub_(t))
        return x, x, x

    def grad_wrt_probs_of_logp(self, z: Tensor, t: Tensor) -> None:
        z.sub_(t)

    def value(self, x: Tensor, y: Tensor, s: Tensor, q: Tensor) -> Tensor:
        return x / s - (s.log() - q.log())

    def center_of_logp(self, center: Tensor, s: Tensor, q: Tensor) -> Tensor:
        return center / s - (s.log() - q.log())


class ForwardKl(ClosedFormDivergence):
    """KL(T‖S)."""

    subtracts_teacher = True
    teacher_share = 1.0

    def grad_wrt_probs(self, z: Tensor, t: Tensor, p: Tensor, q_: Tensor, s: Tensor, q: Tensor) -> Sums:
        return torch.zeros_like(s), dot(q_, t.sub_(z)), -s

    def grad_wrt_probs_of_logp(self, z: Tensor, t: Tensor) -> None:
        z.zero_()

    def value(self, x: Tensor, y: Tensor, s: Tensor, q: Tensor) -> Tensor:
        return y / q + (s.log() - q.log())


class ForwardReverseKl(ReverseKl):
    """α KL(T‖S) + (1−α) KL(S‖T), with f divided by 1−α."""

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective)
        self.teacher_share = self.alpha / (1.0 - self.alpha)

    def grad_wrt_probs(self, z: Tensor, t: Tensor, p: Tensor, q_: Tensor, s: Tensor, q: Tensor) -> Sums:
        x = dot(p, z.sub_(t))
        return x, dot(q_, z), x - self.teacher_share * s

    def value(self, x: Tensor, y: Tensor, s: Tensor, q: Tensor) -> Tensor:
        log_ratio = s.log() - q.log()
        return self.alpha * (log_ratio - y / q) + (1.0 - self.alpha) * (x / s - log_ratio)

    def row_scale(self, s: Tensor, q: Tensor) -> float:
        return 1.0 - self.alpha


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
    "forward_reverse_kl": ForwardReverseKl,
    "generalized_jsd": GeneralizedJsd,
    "skew_reverse_kl": Skewed,
    "skew_forward_kl": Skewed,
}


def closed_form(objective: Objective) -> ClosedFormDivergence:
    """The closed form of an objective's divergence; of a loss that compares no distributions, buffers alone."""
    return CLOSED_FORMS.get(kind_of(objective), ClosedFormDivergence)(objective)


def has_closed_form(rows: RowSpec) -> bool:
    """True if these row passes have the loss; otherwise `losses` and autograd do a few rows at a time."""
    return rows.fits(CLOSED_FORMS)


# ---- row passes ----------------------------------------------------------------------------------------------------


def closed_form_rows(rows: RowSpec, logits: Tensor, *, for_blocks: bool = False) -> RowPass:
    """The row pass of these rows. `for_blocks` keeps what a gradient needs that is made later, and always shifts."""
    if isinstance(rows.target, (HiddenTarget, DenseTarget)):
        row_pass = ClosedFormRows(rows, logits)
    elif isinstance(rows.target, TeacherMixture):
        return SumOfLosses(rows, logits) if rows.target.mixture == "loss" else ClosedFormRows(rows, logits)
    else:
        row_pass = FewTokenRows(rows, logits)
    row_pass.keeps_state = for_blocks
    row_pass.shifted |= for_blocks
    return row_pass


class _ClosedForm:
    fill = MASKED
    makes_diagnostics = False
    keeps_state = False

    def __init__(self, rows: RowSpec, logits: Tensor) -> None:
        self.divergence, self.shards = closed_form(rows.objective), rows.columns.shards
        self.shifted = logits.is_cuda

    def shift(self, logits: Tensor) -> Tensor:
        """Subtract each row's maximum, in place; it is returned."""
        top = self.shards.top(logits, MASKED)
        logits.sub_(top)
        return top

    def mark_out_of_range(self, out: RowResults, sums: Tensor) -> None:
        """Give rows whose sums left the range a loss of NaN, for the chunk loop to recompute, and shift from now on."""
        if not self.shifted:
            outside = out_of_range(sums)
            out.values["loss"].masked_fill_(outside, torch.nan)
            self.shifted = bool(outside.any())


class ClosedFormRows(_ClosedForm):
    """The KLs, the JSD and the skewed KLs against one teacher's logits."""

    def __init__(self, rows: RowSpec, logits: Tensor) -> None:
        super().__init__(rows, logits)
        at_one = rows.objective.student_temperature == rows.objective.teacher_temperature == 1.0
        whole = isinstance(rows.target, (HiddenTarget, DenseTarget))
        self.makes_diagnostics = rows.diagnostics is not None and whole and at_one

    def __call__(
        self, rows: RowSpec, z: Tensor, teachers: Teachers, *, gradient: bool, room: Tensor | None = None
    ) -> RowResults:
        t, ids, form = teachers[0][1], rows.response_ids, self.divergence
        y_logit = z.new_zeros(len(z), 1) if ids is None else self.shards.pick(z, ids.unsqueeze(-1))
        tops = (self.shift(z), self.shift(t)) if self.shifted else None
        y_logit = y_logit if tops is None else y_logit - tops[0]
        seen = self._before(rows, z, t) if self.makes_diagnostics else {}
        parts: list[Sums] = []
        for piece in pieces(z) if self.shards.alone else [slice(0, len(z))]:
            parts.append(self._piece(rows, z[piece], t[piece], y_logit[piece], piece, gradient))
        s, q, zp, tq, x, y, center, *kls = (torch.cat(column).squeeze(-1) for column in zip(*parts, strict=True))
        log_s = s.log()
        values = {
            "divergence": form.value(x, y, s, q),
            "student_entropy": log_s - zp / s,
            "teacher_entropy": q.log() - tq / q,
        }
        if ids is not None:
            values["student_logp"] = restore_neg_inf(y_logit.squeeze(-1) - log_s)
        if self.makes_diagnostics:
            values |= _diagnostics(seen, values, log_s, q.log(), *kls)
        scale = bounded(rows, values, rows.distill_weight * form.row_scale(s, q) / s)
        values["loss"] = rows.distill_weight * values["divergence"]
        slopes = add_few_tokens(rows, values) if rows.has_extras else {}
        out = RowResults(values=values, scale=scale)
        if self.keeps_state and tops is not None:
            center = form.center_of_logp(center, s, q)
            tops_of = [top.squeeze(-1) for top in tops]
            out.state = {"log_s": tops_of[0] + log_s, "log_q": tops_of[1] + q.log(), "center": center, **slopes}
        self.mark_out_of_range(out, torch.stack([s, q], dim=-1))
        return out

    def _piece(self, rows: RowSpec, z: Tensor, t: Tensor, y_logit: Tensor, piece: slice, gradient: bool) -> Sums:
        """The sums of some rows, with everything that may be asked beside the divergence; S p (f − Σ p f) / row_scale replaces z."""
        form, total = self.divergence, self.shards.sum
        p, q_ = torch.exp(z, out=form.buffer("p", z)), torch.exp(t, out=form.buffer("q", z))
        s, q = p.sum(-1, keepdim=True), q_.sum(-1, keepdim=True)
        if form.mixes:
            s, q = total(s, q)
        zp, tq = dot(p, z), dot(q_, t)
        logits = form.buffer("bonus", z).copy_(z) if rows.entropy_bonus else None
        kls: Sums = ()
        if self.makes_diagnostics:
            difference = torch.sub(z, t, out=form.buffer("m", z))
            kls = (dot(p, difference) / s, dot(q_, difference) / q)
        found = form.grad_wrt_probs(z, t, p, q_, s, q)
        if form.mixes:
            x, y, center, zp, tq = total(*found, zp, tq)
        else:
            s, q, x, y, center, zp, tq = total(s, q, *found, zp, tq)
        sums = (s, q, zp, tq, x, y, center, *kls)
        if not gradient:
            return sums
        center = center / s
        if not rows.has_extras and form.subtracts_teacher:
            torch.sub(p, q_.mul_(s / q), out=z)
        elif not rows.has_extras:
            z.sub_(center).mul_(p)
            if form.teacher_share:
                z.sub_(q_.mul_(form.teacher_share * s / q))
        else:
            self._with_extras(rows, z, center, (p, q_, s, q, y_logit - s.log(), zp / s), logits, piece)
        return sums

    def _with_extras(
        self, rows: RowSpec, z: Tensor, center: Tensor, known: Sums, logits: Tensor | None, piece: slice
    ) -> None:
        """The gradient with that of the policy term and the entropy bonus, all divided by what `RowResults.scale` multiplies with.

        `known` are p̃, q̃, S, Q, the response tokens' log-probs and Σ p z; `logits` are a copy, None without a bonus.
        """
        form, (p, q_, s, q, y_logp, mean_z) = self.divergence, known
        weight = rows.distill_weight * form.row_scale(s, q)
        slope = None
        if rows.policy is not None:
            slope = policy_loss(rows.policy.at(piece), y_logp.squeeze(-1))[1].unsqueeze(-1) / weight
            center = center + slope
        if form.subtracts_teacher:
            z.zero_()
        if logits is not None:
            share = rows.entropy_bonus / weight
            z.add_(logits.mul_(share))
            center = center + share * mean_z
        z.sub_(center).mul_(p)
        if form.teacher_share:
            z.sub_(q_.mul_(form.teacher_share * s / q))
        if slope is not None and rows.response_ids is not None:
            self.shards.add_at(z, rows.response_ids[piece].unsqueeze(-1), slope * s)

    def _before(self, rows: RowSpec, z: Tensor, t: Tensor) -> dict[str, Tensor]:
        """The part of the diagnostics that needs logits, before they are gone."""
        assert rows.diagnostics is not None and rows.response_ids is not None
        eos = torch.tensor(rows.diagnostics.eos_ids, device=z.device, dtype=torch.long)
        shared = [top_overlap(z[piece], t[piece], rows.objective.top_k) for piece in pieces(z)]
        y = t.gather(-1, rows.response_ids.unsqueeze(-1)).squeeze(-1)
        return {"overlap": torch.cat(shared), "eos": z[:, eos], "teacher_logit": y}


def _diagnostics(
    seen: dict[str, Tensor], values: dict[str, Tensor], log_s: Tensor, log_q: Tensor, x: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """The rest, from the row pass's sums: x = Σ p (z − t), y = Σ q (z − t)."""
    found = {
        "reverse_kl": x - (log_s - log_q),
        "forward_kl": (log_s - log_q) - y,
        "student_entropy": values["student_entropy"],
        "teacher_entropy": values["teacher_entropy"],
        "student_logp": values["student_logp"],
        "teacher_logp": seen["teacher_logit"] - log_q,
        "overlap": seen["overlap"],
        "eos_prob": (seen["eos"] - log_s.unsqueeze(-1)).exp().sum(-1),
    }
    return {f"diagnostics/{name}": value for name, value in found.items()}


class FewTokenRows(_ClosedForm):
    """Terms that read a few tokens of the student: top-k and sampled targets, the policy term and the entropy bonus."""

    def __call__(
        self, rows: RowSpec, z: Tensor, teachers: Teachers, *, gradient: bool, room: Tensor | None = None
    ) -> RowResults:
        target, shards, ids = rows.target, self.shards, rows.response_ids
        top = self.shift(z) if self.shifted else None
        k_logits = shards.pick(z, target.ids) if isinstance(target, TopKTarget) else None
        y_logit = None if ids is None else shards.pick(z, ids.unsqueeze(-1))
        bonus = z.clone() if rows.entropy_bonus and gradient else None
        s, zp = shards.sum(*self._exponentiate(z))
        log_s = s.log()
        values = {"student_entropy": (log_s - zp / s).squeeze(-1)}
        if y_logit is not None:
            values["student_logp"] = restore_neg_inf(y_logit - log_s).squeeze(-1)
        values["loss"] = torch.zeros_like(log_s.squeeze(-1))
        slopes = add_few_tokens(rows, values, None if k_logits is None else restore_neg_inf(k_logits - log_s))
        scale = self._gradient(rows, z, bonus, s, zp / s, token_slopes(rows, slopes)) if gradient else 1.0 / s
        out = RowResults(values=values, scale=scale.squeeze(-1))
        if self.keeps_state and top is not None:
            out.state = {"log_s": (top + log_s).squeeze(-1), **slopes}
        self.mark_out_of_range(out, s)
        return out

    def _exponentiate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z becomes p̃; Σ p̃ and Σ p̃ z."""
        sums, dots = [], []
        for piece in pieces(z):
            p = z[piece]
            logits = self.divergence.buffer("few", p).copy_(p)
            sums.append(p.exp_().sum(-1, keepdim=True))
            dots.append(dot(p, logits))
        return torch.cat(sums), torch.cat(dots)

    def _gradient(
        self, rows: RowSpec, p: Tensor, bonus: Tensor | None, s: Tensor, mean_z: Tensor, adds: Sequence[Sums]
    ) -> Tensor:
        """p̃ becomes Σ_k F'_k (1[v = k] − p_v) and the entropy bonus's c p (log p + H), over the scale that is returned.

        Without the bonus a row is a multiple of p̃ and a few entries: the multiple goes to the scale, and one pass is saved.
        """
        center = sum((slope.sum(-1, keepdim=True) for _, slope in adds), torch.zeros_like(s))
        size = sum((slope.abs().sum(-1, keepdim=True) for _, slope in adds), torch.zeros_like(s))
        if bonus is None:
            folds = center.abs() > FOLD_SHARE * size
            factor = torch.where(folds, -center / s, 1.0)
            apart = (~folds).squeeze(-1).nonzero().squeeze(-1)
            if len(apart):
                p[apart] *= (-center / s)[apart]
        else:
            share = rows.entropy_bonus
            p.mul_(bonus.mul_(share).sub_(center + share * mean_z))
            factor = 1.0 / s
        for ids, slope in adds:
            self.shards.add_at(p, ids, slope / factor)
        return factor


class SumOfLosses(_ClosedForm):
    """Σ w_i D(S, T_i): each teacher works on a copy of the student's rows."""

    def __init__(self, rows: RowSpec, logits: Tensor) -> None:
        super().__init__(rows, logits)
        self.one, self.rest = ClosedFormRows(rows, logits), FewTokenRows(rows, logits)

    def __call__(
        self, rows: RowSpec, z: Tensor, teachers: Teachers, *, gradient: bool, room: Tensor | None = None
    ) -> RowResults:
        total, copy = torch.zeros_like(z), torch.empty_like(z)
        plain = replace(rows, policy=None, entropy_bonus=0.0)
        values: dict[str, Tensor] = {}
        shifts = False
        for number, (weight, t) in enumerate(teachers):
            assert weight is not None
            self.one.shifted = self.shifted
            one = self.one(plain, copy.copy_(z), [(None, t)], gradient=gradient)
            shifts |= self.one.shifted
            if gradient:
                total.addcmul_(copy, (weight * one.scale).unsqueeze(-1))
            for name in ("divergence", "loss"):  # 0 · inf is NaN, and the chunk loop recomputes such a row
                values[name] = values.get(name, 0.0) + weight * one.values[name]
            if number == 0:
                values |= {name: one.values[name] for name in ("student_entropy", "student_logp") if name in one.values}
        if rows.has_extras:
            self.rest.shifted = self.shifted
            rest = self.rest(rows, copy.copy_(z), [], gradient=gradient)
            shifts |= self.rest.shifted
            total.addcmul_(copy, rest.scale.unsqueeze(-1))
            values |= {name: rest.values[name] for name in ("policy_loss", "clipped") if name in rest.values}
            values["loss"] = values["loss"] + rest.values["loss"]
        self.shifted = shifts
        z.copy_(total)
        return RowResults(values=values, scale=torch.ones_like(values["loss"]))


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

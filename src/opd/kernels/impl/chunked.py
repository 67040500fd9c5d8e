"""PyTorch only: row passes that write the gradient over the logits, a few rows at a time so that they stay in cache.

Factors of a whole row (1/S, λ, 1/β) go to the hidden rows (`Rows.scale`). Logits are not shifted by their maximum as long as the
sums of a row stay in the middle of float32's range; a row where they do not is done again by `walk`, and from then on logits
are shifted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opd.kernels.forms import Form, dot, has_closed_form, with_extras
from opd.kernels.generic import ByAutograd
from opd.kernels.normal import pieces, rows_together, unsafe
from opd.kernels.request import MASKED, Answer, Request, select_policy, select_target, true_infinity
from opd.kernels.rows import Rows
from opd.kernels.terms import FewTokens, policy_loss
from opd.kernels.walk import walk
from opd.losses import top_overlap
from opd.types import DenseTarget, HiddenTarget, SampledTarget, TopKTarget

LEAN = ("reverse_kl", "forward_kl", "generalized_jsd")
FOLD_SHARE = 1e-3  # a row's multiple of p̃ becomes a divisor only if it is this share of the entries beside it, or more


def run(request: Request) -> Answer:
    """The request's loss and gradients."""
    if not has_closed_form(request):
        return walk(request, lambda rows: ByAutograd(request))
    return walk(request, lambda rows: ClosedForm(request, rows))


class ClosedForm:
    """The row pass of the KLs, the JSD, the skewed KLs, and of terms that read a few tokens."""

    fill = MASKED

    def __init__(self, request: Request, rows: int) -> None:
        self.request, self.shards = request, request.shards
        self.form = Form(request)
        self.extras = request.policy is not None or request.entropy_bonus != 0.0
        self.shifted = request.hidden.is_cuda
        objective = request.objective
        at_one = objective.student_temperature == objective.teacher_temperature == 1.0
        self.watches = request.watch is not None and isinstance(request.target, (HiddenTarget, DenseTarget)) and at_one

    def __call__(
        self, z: Tensor, teachers: Sequence[tuple[Tensor | None, Tensor]], index: Tensor, *, gradient: bool
    ) -> Rows:
        if not teachers:
            out = self._few(z, index, gradient)
        elif teachers[0][0] is None:
            out = self._full(z, teachers[0][1], index, gradient, self.request.distill_weight, self.extras)
        else:
            out = self._sum_of_losses(z, teachers, index, gradient)
        sums = out.values.pop("sums", None)
        if sums is not None and not self.shifted:
            outside = unsafe(sums)
            out.values["loss"].masked_fill_(outside, torch.nan)
            self.shifted = bool(outside.any())
        return out

    def _pieces(self, z: Tensor) -> list[slice]:
        return pieces(z) if self.shards.alone else [slice(0, z.shape[0])]

    def _shift(self, logits: Tensor) -> Tensor:
        """Subtract each row's maximum, in place; it is returned."""
        (top,) = self.shards.max(
            logits.amax(-1, keepdim=True) if logits.shape[1] else logits.new_full((len(logits), 1), MASKED)
        )
        logits.sub_(top)
        return top

    # ---- whole rows of both models ---------------------------------------------------------------------------------

    def _full(self, z: Tensor, t: Tensor, index: Tensor, gradient: bool, weight: float, extras: bool) -> Rows:
        y_logit = self._response_logits(z, index)
        top = self._shift(z) if self.shifted else None
        if top is not None:
            self._shift(t)
            y_logit = y_logit - top
        seen = self._watch(z, t, index) if self.watches else {}
        rows = len(z) if not self.shards.alone else rows_together(z)
        parts = zip(z.split(rows), t.split(rows), y_logit.split(rows), index.split(rows), strict=True)
        if self.form.kind in LEAN and not extras and not self.watches:
            pieces = [self._lean_piece(zp, tp, gradient) for zp, tp, _, _ in parts]
        else:
            pieces = [self._full_piece(zp, tp, yp, ip, gradient, weight, extras) for zp, tp, yp, ip in parts]
        s, q, zp, tq, x, y, *kls = (torch.cat(column).squeeze(-1) for column in zip(*pieces, strict=True))
        log_s = s.log()
        values = {
            "divergence": self.form.divergence(x, y, s, q),
            "student_entropy": log_s - zp / s,
            "teacher_entropy": q.log() - tq / q,
            "sums": torch.stack([s, q], dim=-1),
        }
        if self.request.response_ids is not None:
            values["student_logp"] = true_infinity(y_logit.squeeze(-1) - log_s)
        if self.watches:
            values |= self._seen(seen, values, log_s, q.log(), *kls)
        total = weight * values["divergence"]
        values = with_extras(self.request, values, total, index) if extras else {**values, "loss": total}
        return Rows(values=values, scale=weight * self.form.factor(s, q) / s)

    def _watch(self, z: Tensor, t: Tensor, index: Tensor) -> dict[str, Tensor]:
        """What the diagnostics need of the logits before they are gone."""
        request = self.request
        assert request.watch is not None and request.response_ids is not None
        eos = torch.tensor([i for i in request.watch.eos_ids if i < request.vocab], device=z.device, dtype=torch.long)
        shared = [top_overlap(z[s], t[s], request.objective.top_k) for s in self._pieces(z)]
        y = t.gather(-1, request.response_ids[index].unsqueeze(-1)).squeeze(-1)
        return {"overlap": torch.cat(shared), "eos": z[:, eos], "teacher_logit": y}

    def _seen(
        self, seen: dict[str, Tensor], values: dict[str, Tensor], log_s: Tensor, log_q: Tensor, x: Tensor, y: Tensor
    ) -> dict[str, Tensor]:
        """The diagnostics, from that and from the row pass's sums: x = Σ p (z − t), y = Σ q (z − t)."""
        return {
            "watch/reverse_kl": x - (log_s - log_q),
            "watch/forward_kl": (log_s - log_q) - y,
            "watch/student_entropy": values["student_entropy"],
            "watch/teacher_entropy": values["teacher_entropy"],
            "watch/student_logp": values["student_logp"],
            "watch/teacher_logp": seen["teacher_logit"] - log_q,
            "watch/overlap": seen["overlap"],
            "watch/eos_prob": (seen["eos"] - log_s.unsqueeze(-1)).exp().sum(-1),
        }

    def _response_logits(self, z: Tensor, index: Tensor) -> Tensor:
        """The logit of each response token, [rows, 1]; 0 when nobody asks."""
        ids = self.request.response_ids
        return z.new_zeros(z.shape[0], 1) if ids is None else self.shards.pick(z, ids[index].unsqueeze(-1))

    def _full_piece(
        self, z: Tensor, t: Tensor, y_logit: Tensor, index: Tensor, gradient: bool, weight: float, extras: bool
    ) -> tuple[Tensor, ...]:
        form = self.form
        p, q_ = form.buffer("p", z), form.buffer("q", z)
        torch.exp(z, out=p)
        torch.exp(t, out=q_)
        s, q = self.shards.sum(p.sum(-1, keepdim=True), q_.sum(-1, keepdim=True))
        zp, tq = dot(p, z), dot(q_, t)
        bonus = form.buffer("bonus", z).copy_(z) if extras and self.request.entropy_bonus else None
        kls: tuple[Tensor, ...] = ()
        if self.watches:
            difference = torch.sub(z, t, out=form.buffer("m", z))
            kls = (dot(p, difference) / s, dot(q_, difference) / q)
        x, y, center, zp, tq = self.shards.sum(*form.slope(z, t, p, q_, s, q), zp, tq)
        if gradient and extras:
            parts = (bonus, y_logit - s.log(), zp / s)
            at_response = form.finish_with_extras(z, p, q_, s, q, center / s, weight, index, parts)
            if at_response is not None and self.request.response_ids is not None:
                self.shards.add_at(z, self.request.response_ids[index].unsqueeze(-1), at_response)
        elif gradient:
            form.finish(z, p, q_, s, q, center / s)
        return s, q, zp, tq, x, y, *kls

    def _lean_piece(self, z: Tensor, t: Tensor, gradient: bool) -> tuple[Tensor, ...]:
        """`_full_piece` for the common divergences alone, in one buffer (two for the JSD) so that more stays in cache."""
        form, total = self.form, self.shards.sum
        one = form.buffer("p", z)
        torch.exp(t, out=one)
        q, tq = one.sum(-1, keepdim=True), dot(one, t)
        none = torch.zeros_like(q)
        if form.kind == "forward_kl":
            y = dot(one, t.sub_(z))
            p = torch.exp(z, out=t)
            s, q, zp, tq, y = total(p.sum(-1, keepdim=True), q, dot(p, z), tq, y)
            if gradient:
                torch.sub(p, one.mul_(s / q), out=z)
            return s, q, zp, tq, none, y
        if form.kind == "reverse_kl":
            p = torch.exp(z, out=one)
            s, zp = p.sum(-1, keepdim=True), dot(p, z)
            s, q, zp, tq, x = total(s, q, zp, tq, dot(p, z.sub_(t)))
            if gradient:
                z.sub_(x / s).mul_(p)
            return s, q, zp, tq, x, none
        p = torch.exp(z, out=form.buffer("m", z))
        s, zp = p.sum(-1, keepdim=True), dot(p, z)
        s, q, zp, tq = total(s, q, zp, tq)
        x, y = total(*form.mixture_sums(z, t, p, one, q / s))
        if gradient:
            z.add_(x / s).mul_(p)
        return s, q, zp, tq, x, y

    def _sum_of_losses(
        self, z: Tensor, teachers: Sequence[tuple[Tensor | None, Tensor]], index: Tensor, gradient: bool
    ) -> Rows:
        """Σ w_i D(S, T_i): each teacher works on a copy of the student's rows."""
        total, copy = torch.zeros_like(z), torch.empty_like(z)
        values: dict[str, Tensor] = {}
        sums = []
        for number, (weight, t) in enumerate(teachers):
            assert weight is not None
            one = self._full(copy.copy_(z), t, index, gradient, self.request.distill_weight, False)
            sums.append(one.values["sums"])
            if gradient:
                total.addcmul_(copy, (weight * one.scale).unsqueeze(-1))
            for name in ("divergence", "loss"):  # 0 · inf is NaN, and `walk` does such a row again
                values[name] = values.get(name, 0.0) + weight * one.values[name]
            if number == 0:
                values |= {name: one.values[name] for name in ("student_entropy", "student_logp") if name in one.values}
        if self.extras:
            rest = self._few(copy.copy_(z), index, gradient, distill=False)
            sums.append(rest.values["sums"])
            total.addcmul_(copy, rest.scale.unsqueeze(-1))
            values |= {name: rest.values[name] for name in ("policy_loss", "clipped") if name in rest.values}
            values["loss"] = values["loss"] + rest.values["loss"]
        z.copy_(total)
        return Rows(values={**values, "sums": torch.cat(sums, dim=-1)}, scale=torch.ones_like(values["loss"]))

    # ---- terms that read a few tokens of the student ---------------------------------------------------------------

    def _few(self, z: Tensor, index: Tensor, gradient: bool, distill: bool = True) -> Rows:
        request, shards = self.request, self.shards
        if self.shifted:
            self._shift(z)
        target = select_target(request.target, index) if distill else None
        ids = None if request.response_ids is None else request.response_ids[index]
        k_logits = shards.pick(z, target.ids) if isinstance(target, TopKTarget) else None
        y_logit = None if ids is None else shards.pick(z, ids.unsqueeze(-1))
        bonus = z.clone() if request.entropy_bonus and gradient else None
        s, zp = shards.sum(*self._exponentiate(z))
        log_s = s.log()
        values = {"student_entropy": (log_s - zp / s).squeeze(-1), "sums": s}
        if y_logit is not None:
            values["student_logp"] = true_infinity(y_logit - log_s).squeeze(-1)
        total, k_slope, y_slope = torch.zeros_like(log_s.squeeze(-1)), None, None
        if isinstance(target, (TopKTarget, SampledTarget)):
            sampler = None if request.sampler_logp is None else request.sampler_logp[index]
            few = FewTokens(request.objective, target, ids, sampler)
            on_k = None if k_logits is None else true_infinity(k_logits - log_s)
            loss, k_slope, y_slope, clamped = few.loss(on_k, values.get("student_logp"))
            values |= {"divergence": loss, "clamped": clamped}
            total = request.distill_weight * loss
        values = with_extras(request, values, total, index)
        scale = 1.0 / s
        if gradient:
            scale = self._few_gradient(z, bonus, target, index, s, zp / s, (k_slope, y_slope), values)
        return Rows(values=values, scale=scale.squeeze(-1))

    def _exponentiate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z becomes p̃; Σ p̃ and Σ p̃ z."""
        sums, dots = [], []
        for piece in pieces(z):
            p = z[piece]
            logits = self.form.buffer("few", p).copy_(p)
            sums.append(p.exp_().sum(-1, keepdim=True))
            dots.append(dot(p, logits))
        return torch.cat(sums), torch.cat(dots)

    def _few_gradient(
        self,
        p: Tensor,
        bonus: Tensor | None,
        target: object,
        index: Tensor,
        s: Tensor,
        mean_z: Tensor,
        slopes: tuple[Tensor | None, Tensor | None],
        values: dict[str, Tensor],
    ) -> Tensor:
        """p̃ becomes Σ_k F'_k (1[v = k] − p_v) and the entropy bonus's c p (log p + H), over the scale that is returned.

        Without the bonus a row is a multiple of p̃ and a few entries: the multiple goes to the scale, and one pass is saved.
        """
        weight = self.request.distill_weight
        k_slope, y_slope = (None if part is None else weight * part for part in slopes)
        policy = select_policy(self.request.policy, index)
        if policy is not None:
            more = policy_loss(policy, values["student_logp"])[1]
            y_slope = more if y_slope is None else y_slope + more
        parts = [(target.ids, k_slope)] if k_slope is not None and isinstance(target, TopKTarget) else []
        if y_slope is not None and self.request.response_ids is not None:
            parts.append((self.request.response_ids[index].unsqueeze(-1), y_slope.unsqueeze(-1)))
        center = sum((slope.sum(-1, keepdim=True) for _, slope in parts), torch.zeros_like(s))
        size = sum((slope.abs().sum(-1, keepdim=True) for _, slope in parts), torch.zeros_like(s))
        if bonus is None:
            folds = center.abs() > FOLD_SHARE * size
            factor = torch.where(folds, -center / s, 1.0)
            apart = (~folds).squeeze(-1).nonzero().squeeze(-1)
            if len(apart):
                p[apart] *= (-center / s)[apart]
        else:
            share = self.request.entropy_bonus
            p.mul_(bonus.mul_(share).sub_(center + share * mean_z))
            factor = 1.0 / s
        for ids, slope in parts:
            self.shards.add_at(p, ids, slope / factor)
        return factor

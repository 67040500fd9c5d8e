"""PyTorch only: row passes that write the gradient over the logits, a few rows at a time so that they stay in cache.

Factors of a whole row (1/S, λ, 1/β) go to the hidden rows (`RowResults.scale`). Logits are not shifted by their maximum as long as the
sums of a row stay in the middle of float32's range; a row where they do not is recomputed by the chunk loop, and from then on logits
are shifted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from opd.kernels.chunk_loop import RowPass
from opd.kernels.closed_form import (
    Sums,
    add_policy_and_entropy,
    closed_form,
    dot,
    few_tokens_loss,
    out_of_range,
    pieces,
    policy_loss,
    token_slopes,
)
from opd.kernels.row_spec import MASKED, RowResults, RowSpec, Teachers, restore_neg_inf
from opd.losses import top_overlap
from opd.types import DenseTarget, HiddenTarget, TeacherMixture, TopKTarget

FOLD_SHARE = 1e-3  # a row's multiple of p̃ becomes a divisor only if it is this share of the entries beside it, or more


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

    def __call__(self, rows: RowSpec, z: Tensor, teachers: Teachers, *, gradient: bool) -> RowResults:
        t, ids, form = teachers[0][1], rows.response_ids, self.divergence
        y_logit = z.new_zeros(len(z), 1) if ids is None else self.shards.pick(z, ids.unsqueeze(-1))
        tops = (self.shift(z), self.shift(t)) if self.shifted else None
        y_logit = y_logit if tops is None else y_logit - tops[0]
        seen = self._before(rows, z, t) if self.makes_diagnostics else {}
        parts: list[Sums] = []
        for piece in pieces(z) if self.shards.alone else [slice(0, len(z))]:
            part = None
            if not rows.has_extras and not self.makes_diagnostics and not self.keeps_state:
                part = form.row_pass(z[piece], t[piece], self.shards.sum, gradient)
            parts.append(part or self._piece(rows, z[piece], t[piece], y_logit[piece], piece, gradient))
        s, q, zp, tq, x, y, *more = (torch.cat(column).squeeze(-1) for column in zip(*parts, strict=True))
        log_s = s.log()
        values = {
            "divergence": form.value(x, y, s, q),
            "student_entropy": log_s - zp / s,
            "teacher_entropy": q.log() - tq / q,
        }
        if ids is not None:
            values["student_logp"] = restore_neg_inf(y_logit.squeeze(-1) - log_s)
        if self.makes_diagnostics:
            values |= _diagnostics(seen, values, log_s, q.log(), *more[1:])
        loss = rows.distill_weight * values["divergence"]
        values = add_policy_and_entropy(rows, values, loss)
        out = RowResults(values=values, scale=rows.distill_weight * form.row_scale(s, q) / s)
        if self.keeps_state and tops is not None:
            center = more[0] / s if form.mixes else values["divergence"].clone()
            tops_of = [top.squeeze(-1) for top in tops]
            out.state = {"log_s": tops_of[0] + log_s, "log_q": tops_of[1] + q.log(), "center": center}
        self.mark_out_of_range(out, torch.stack([s, q], dim=-1))
        return out

    def _piece(self, rows: RowSpec, z: Tensor, t: Tensor, y_logit: Tensor, piece: slice, gradient: bool) -> Sums:
        """The sums of some rows, with everything that may be asked beside the divergence; S p (f − Σ p f) / row_scale replaces z."""
        form, total = self.divergence, self.shards.sum
        p, q_ = torch.exp(z, out=form.buffer("p", z)), torch.exp(t, out=form.buffer("q", z))
        s, q = total(p.sum(-1, keepdim=True), q_.sum(-1, keepdim=True))
        zp, tq = dot(p, z), dot(q_, t)
        logits = form.buffer("bonus", z).copy_(z) if rows.entropy_bonus else None
        kls: Sums = ()
        if self.makes_diagnostics:
            difference = torch.sub(z, t, out=form.buffer("m", z))
            kls = (dot(p, difference) / s, dot(q_, difference) / q)
        x, y, center, zp, tq = total(*form.grad_wrt_probs(z, t, p, q_, s, q), zp, tq)
        sums = (s, q, zp, tq, x, y, center, *kls)
        if not gradient:
            return sums
        center = center / s
        if not rows.has_extras and form.subtracts_teacher:
            torch.sub(p, q_.mul_(s / q), out=z)
        elif not rows.has_extras:
            z.sub_(center).mul_(p)
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
            center = center - 1.0
        if logits is not None:
            share = rows.entropy_bonus / weight
            z.add_(logits.mul_(share))
            center = center + share * mean_z
        z.sub_(center).mul_(p)
        if form.subtracts_teacher:
            z.sub_(q_.mul_(s / q))
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

    def __call__(self, rows: RowSpec, z: Tensor, teachers: Teachers, *, gradient: bool) -> RowResults:
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
        loss, slopes = torch.zeros_like(log_s.squeeze(-1)), (None, None)
        if target is not None:
            on_k = None if k_logits is None else restore_neg_inf(k_logits - log_s)
            values["divergence"], *found, values["clamped"] = few_tokens_loss(rows, on_k, values.get("student_logp"))
            loss = rows.distill_weight * values["divergence"]
            slopes = [None if slope is None else rows.distill_weight * slope for slope in found]
        values = add_policy_and_entropy(rows, values, loss)
        adds = token_slopes(rows, values, slopes[0], slopes[1])
        scale = self._gradient(rows, z, bonus, s, zp / s, adds) if gradient else 1.0 / s
        out = RowResults(values=values, scale=scale.squeeze(-1))
        if self.keeps_state and top is not None:
            out.state = {"log_s": (top + log_s).squeeze(-1)}
            named = zip(("k_slope", "y_slope"), slopes, strict=True)
            out.state |= {name: slope for name, slope in named if slope is not None}
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

    def __call__(self, rows: RowSpec, z: Tensor, teachers: Teachers, *, gradient: bool) -> RowResults:
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

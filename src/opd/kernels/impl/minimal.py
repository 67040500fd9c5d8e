"""Blocks of the vocabulary instead of whole rows: nothing larger than [tokens, block] exists beside the gradients.

First pass: running maxima and sums. Last pass: the gradient of each block, through the products. Both compute the logits: 6
products for the KLs, 4 for top-k. Where f depends on the sums (JSD, skewed KLs), Σ p f is wanted between the two. The memory
of the weight's gradient, which nobody has written yet, then holds whole rows of logits for the first pass, hidden size / 2
tokens at a time, and the sums and Σ p f come of the same logits: 6 products again. Where the weight has no gradient the
logits are computed three times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.errors import ObjectiveError
from opd.kernels.forms import Form, dot, has_closed_form, with_extras
from opd.kernels.generic import by_autograd
from opd.kernels.products import Head
from opd.kernels.request import (
    MASKED,
    Answer,
    Request,
    TeacherMixture,
    select_policy,
    select_target,
    target_has_logits,
    true_infinity,
)
from opd.kernels.rows import Rows
from opd.kernels.terms import FewTokens, policy_loss
from opd.kernels.walk import Gradients, chunk_of, masked_columns, student_head
from opd.types import DenseTarget, HiddenTarget, SampledTarget, TopKTarget

BLOCK_BYTES = 1 << 29  # of one block of logits, times the deeper hidden size: the products pack as many rows, that deep
MAX_BLOCK_BYTES = 2 << 20
MIN_WIDTH = 64
PIECE = 1 << 15  # entries of a row pass that stay in cache; three buffers of them are within the mode's few mebibytes


@dataclass
class Sums:
    """Of one model's rows, shifted by their running maximum; all [rows, 1]."""

    top: Tensor
    mass: Tensor
    mean: Tensor
    """Σ e^(z − top) z."""

    @classmethod
    def empty(cls, rows: int, like: Tensor) -> Sums:
        zero = like.new_zeros(rows, 1)
        return cls(top=zero + MASKED, mass=zero, mean=zero.clone())

    def rescale(self, top: Tensor) -> Tensor:
        """Move to a new maximum; returns what older sums are to be multiplied by."""
        factor = (self.top - top).exp()
        self.top = top
        self.mass = self.mass * factor
        self.mean = self.mean * factor
        return factor

    @classmethod
    def join(cls, parts: Sequence[Sums]) -> Sums:
        """One after the other."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("top", "mass", "mean")))

    @property
    def log_mass(self) -> Tensor:
        return self.top + self.mass.log()

    @property
    def entropy(self) -> Tensor:
        return (self.log_mass - self.mean / self.mass).squeeze(-1)


@dataclass
class Found:
    """What the passes over one chunk of tokens have gathered."""

    student: Sums
    teacher: Sums
    x: Tensor
    y: Tensor
    center: Tensor
    k_logits: Tensor | None = None
    y_logit: Tensor | None = None

    @classmethod
    def join(cls, parts: Sequence[Found]) -> Found:
        """One after the other."""
        x, y, center = (torch.cat([getattr(part, name) for part in parts]) for name in ("x", "y", "center"))
        ids = [part.y_logit for part in parts if part.y_logit is not None]
        return cls(
            Sums.join([part.student for part in parts]),
            Sums.join([part.teacher for part in parts]),
            x,
            y,
            center,
            y_logit=torch.cat(ids) if ids else None,
        )


def run(request: Request) -> Answer:
    """The request's loss and gradients. Raises ObjectiveError for what this mode does not do."""
    if not request.shards.alone or isinstance(request.target, TeacherMixture) or not has_closed_form(request):
        raise ObjectiveError(
            "memory='minimal' takes one teacher, a whole vocabulary, and a KL, JSD or skewed KL without teacher_logp_floor (or top-k, or "
            "sampled log-probs); use memory='fast', with a small chunk_tokens where memory is short."
        )
    return _Blocks(request).run()


class _Blocks:
    def __init__(self, request: Request) -> None:
        self.request = request
        self.masked = masked_columns(request)
        self.head = student_head(request, self.masked)
        self.form = Form(request)
        target = request.target
        self.teacher: Head | None = None
        if isinstance(target, HiddenTarget):
            columns, bias = self.head.columns, target.head.bias
            self.teacher = Head(
                target.head.weight[:columns],
                None if bias is None else bias[:columns],
                dtype=request.dtype,
                temperature=request.objective.teacher_temperature,
                masked=self.masked,
            )
        self.has_teacher = target_has_logits(target)
        self.chunk = chunk_of(request)
        size = torch.finfo(request.dtype).bits // 8
        depth = max([request.hidden.shape[1]] + ([target.hidden.shape[1]] if isinstance(target, HiddenTarget) else []))
        block = min(MAX_BLOCK_BYTES, BLOCK_BYTES // depth)
        self.width = min(self.head.columns, max(MIN_WIDTH, block // (size * self.chunk)))
        self.gradients = Gradients(request, self.head)
        blank = {"dtype": request.dtype, "device": request.hidden.device}
        self.z_buffer = torch.empty(self.chunk * self.width, **blank)
        self.t_buffer = torch.empty(self.chunk * self.width if self.has_teacher else 0, **blank)

    def run(self) -> Answer:
        request, done = self.request, []
        if self.gradients.hidden is not None:
            self.gradients.hidden.zero_()
        chunks = [
            torch.arange(first, min(first + self.chunk, request.tokens), device=request.hidden.device)
            for first in range(0, request.tokens, self.chunk)
        ]
        statistics = [self._statistics(index) for index in chunks]  # of all, while the weight's gradient is unwritten
        for index, found in zip(chunks, statistics, strict=True):
            done.append(self._chunk(index, found))
        return self.gradients.answer(Rows.join(done, self.z_buffer).values)

    def _blocks(self) -> range:
        return range(0, self.head.columns, self.width)

    def _logits(self, index: Tensor, first: int) -> tuple[Tensor, Tensor | None]:
        """Student and teacher logits of one block."""
        width = min(self.width, self.head.columns - first)
        return self._logits_in(self.z_buffer, self.t_buffer, index, first, width)

    def _logits_in(
        self, z_buffer: Tensor, t_buffer: Tensor, index: Tensor, first: int, width: int
    ) -> tuple[Tensor, Tensor | None]:
        request, rows = self.request, len(index)
        z = z_buffer[: rows * width].view(rows, width)
        self.head.logits(request.hidden[index[0] : index[-1] + 1], z, MASKED, first)
        target = request.target
        if not self.has_teacher:
            return z, None
        t = t_buffer[: rows * width].view(rows, width)
        span = slice(int(index[0]), int(index[-1]) + 1)
        if isinstance(target, HiddenTarget):
            assert self.teacher is not None
            self.teacher.logits(target.hidden[span], t, MASKED, first)
        elif isinstance(target, DenseTarget):
            t.copy_(target.logits[span, first : first + width]).div_(request.objective.teacher_temperature)
            self.head.mask(t, MASKED, first)
        return z, t

    def _chunk(self, index: Tensor, found: Found) -> Rows:
        rows, slopes = self._values(index, found)
        wanted = self.request.needs.any
        bad = rows.broken()
        if wanted:
            self._gradient(index, found, rows, slopes, bad)
        if len(bad):
            self._mend(index, bad, rows)
        return rows

    # ---- first pass ------------------------------------------------------------------------------------------------

    def _statistics(self, index: Tensor) -> Found:
        whole_rows = self.has_teacher and self.form.mixes and self.gradients.weight is not None
        if whole_rows and self.request.weight.shape[1] > 1:
            return Found.join([self._of_whole_rows(some) for some in index.split(self.request.weight.shape[1] // 2)])
        found = self._nothing(index)
        for first in self._blocks():
            self._see(found, index, *self._logits(index, first), first)
        if self.has_teacher and self.form.mixes:
            for first in self._blocks():
                self._add_centers(found, *self._logits(index, first))
        return found

    def _of_whole_rows(self, index: Tensor) -> Found:
        """Sums and centers of the same logits, kept in the memory of the weight's gradient."""
        assert self.gradients.weight is not None
        memory = self.gradients.weight[: self.head.columns].view(-1)
        half = len(index) * self.head.columns
        z, t = self._logits_in(memory[:half], memory[half:], index, 0, self.head.columns)
        found = self._nothing(index)
        self._see(found, index, z, t, 0)
        self._add_centers(found, z, t)
        return found

    def _nothing(self, index: Tensor) -> Found:
        rows, like = len(index), self.z_buffer
        zeros = [like.new_zeros(rows, 1) for _ in range(3)]
        found = Found(Sums.empty(rows, like), Sums.empty(rows, like), *zeros)
        if isinstance(self.request.target, TopKTarget):
            found.k_logits = torch.full_like(self.request.target.ids[index], MASKED, dtype=like.dtype)
        if self.request.response_ids is not None:
            found.y_logit = torch.full_like(zeros[0], MASKED)
        return found

    def _see(self, found: Found, index: Tensor, z: Tensor, t: Tensor | None, first: int) -> None:
        target, ids = self.request.target, self.request.response_ids
        if found.k_logits is not None and isinstance(target, TopKTarget):
            _pick(z, target.ids[index], first, found.k_logits)
        if found.y_logit is not None and ids is not None:
            _pick(z, ids[index].unsqueeze(-1), first, found.y_logit)
        self._add_block(found, z, t)

    def _add_block(self, found: Found, z: Tensor, t: Tensor | None) -> None:
        s = found.student
        old = s.rescale(torch.maximum(s.top, z.amax(-1, keepdim=True)))
        if t is not None:
            q = found.teacher
            old_q = q.rescale(torch.maximum(q.top, t.amax(-1, keepdim=True)))
            found.x, found.y = found.x * old, found.y * old_q
        step = max(1, PIECE // z.shape[1])
        for a in range(0, len(z), step):
            piece = slice(a, a + step)
            zp = z[piece]
            p = torch.sub(zp, s.top[piece], out=self.form.buffer("p", zp)).exp_()
            s.mass[piece] += p.sum(-1, keepdim=True)
            s.mean[piece] += dot(p, zp)
            if t is None:
                continue
            tp = t[piece]
            q_ = torch.sub(tp, found.teacher.top[piece], out=self.form.buffer("q", tp)).exp_()
            found.teacher.mass[piece] += q_.sum(-1, keepdim=True)
            found.teacher.mean[piece] += dot(q_, tp)
            if self.form.kind == "reverse_kl":
                found.x[piece] += dot(p, zp.sub_(tp))
            elif self.form.kind == "forward_kl":
                found.y[piece] += dot(q_, tp.sub_(zp))

    def _add_centers(self, found: Found, z: Tensor, t: Tensor | None) -> None:
        """Of forms that mix: what needs the sums. The logits are used up."""
        assert t is not None
        for piece, zp, tp, p, q_ in self._pieces(found, z, t):
            one = torch.ones_like(p[:, :1])
            x, y, center = self.form.slope(zp, tp, p, q_, one, one)
            found.x[piece] += x
            found.y[piece] += y
            found.center[piece] += center

    def _pieces(self, found: Found, z: Tensor, t: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
        """Normalised log-probs and probabilities of one block, a few rows at a time."""
        step = max(1, PIECE // z.shape[1])
        for a in range(0, len(z), step):
            piece = slice(a, a + step)
            zp, tp = z[piece].sub_(found.student.log_mass[piece]), t[piece].sub_(found.teacher.log_mass[piece])
            p, q_ = torch.exp(zp, out=self.form.buffer("p", zp)), torch.exp(tp, out=self.form.buffer("q", tp))
            yield piece, zp, tp, p, q_

    # ---- what the rows say -----------------------------------------------------------------------------------------

    def _values(self, index: Tensor, found: Found) -> tuple[Rows, tuple[Tensor | None, Tensor | None]]:
        request, form = self.request, self.form
        log_s = found.student.log_mass
        values = {"student_entropy": found.student.entropy}
        if found.y_logit is not None:
            values["student_logp"] = true_infinity(found.y_logit - log_s).squeeze(-1)
        total = torch.zeros_like(values["student_entropy"])
        k_slope = y_slope = None
        target = select_target(request.target, index)
        if self.has_teacher:
            values["teacher_entropy"] = found.teacher.entropy
            one = torch.ones_like(log_s)
            x, y = found.x, found.y
            if not form.mixes:
                log_q = found.teacher.log_mass
                x = x / found.student.mass - log_s + log_q
                y = y / found.teacher.mass + log_s - log_q
                found.center = x
            values["divergence"] = form.divergence(x, y, one, one).squeeze(-1)
        elif isinstance(target, (TopKTarget, SampledTarget)):
            ids = None if request.response_ids is None else request.response_ids[index]
            sampler = None if request.sampler_logp is None else request.sampler_logp[index]
            few = FewTokens(request.objective, target, ids, sampler)
            on_k = None if found.k_logits is None else true_infinity(found.k_logits - log_s)
            values["divergence"], k_slope, y_slope, values["clamped"] = few.loss(on_k, values.get("student_logp"))
        if "divergence" in values:
            total = request.distill_weight * values["divergence"]
        values = with_extras(request, values, total, index)
        return Rows(values=values, scale=torch.ones_like(total)), (k_slope, y_slope)

    # ---- last pass -------------------------------------------------------------------------------------------------

    def _gradient(
        self, index: Tensor, found: Found, rows: Rows, slopes: tuple[Tensor | None, Tensor | None], bad: Tensor
    ) -> None:
        request, scale = self.request, self.request.distill_weight
        adds: list[tuple[Tensor, Tensor]] = []
        target = select_target(request.target, index)
        k_slope, y_slope = slopes
        if k_slope is not None and isinstance(target, TopKTarget):
            adds.append((target.ids, k_slope * scale))
        ids = None if request.response_ids is None else request.response_ids[index].unsqueeze(-1)
        policy_slope = self._policy_slope(index, rows)
        if y_slope is not None or policy_slope is not None:
            assert ids is not None
            both = [part for part in (None if y_slope is None else y_slope * scale, policy_slope) if part is not None]
            adds.append((ids, torch.stack(both).sum(0).unsqueeze(-1)))
        span = slice(int(index[0]), int(index[-1]) + 1)
        weights = (request.token_weights[span] / request.objective.student_temperature).unsqueeze(-1)
        for first in self._blocks():
            gradient = self._block_gradient(index, found, adds, first).mul_(weights)
            if len(bad):
                gradient[bad] = 0.0
            self._through_products(gradient, span, first)

    def _policy_slope(self, index: Tensor, rows: Rows) -> Tensor | None:
        policy = select_policy(self.request.policy, index)
        return None if policy is None else policy_loss(policy, rows.values["student_logp"])[1]

    def _block_gradient(self, index: Tensor, found: Found, adds: list[tuple[Tensor, Tensor]], first: int) -> Tensor:
        """d(loss per token)/d(logits / T) of one block."""
        request, form = self.request, self.form
        few = sum((slope.sum(-1, keepdim=True) for _, slope in adds), torch.zeros_like(found.x))
        entropy = found.student.entropy.unsqueeze(-1)
        log_s = found.student.log_mass
        whole, t = self._logits(index, first)
        if t is None:
            z = whole
            for a in range(0, len(z), max(1, PIECE // z.shape[1])):
                piece = slice(a, a + max(1, PIECE // z.shape[1]))
                rows = z[piece].sub_(log_s[piece])
                p = torch.exp(rows, out=form.buffer("p", rows))
                self._extra_slope(rows, None, few[piece], entropy[piece]).mul_(p)
            _scatter(z, adds, first)
            return z
        for piece, z, tp, p, q_ in self._pieces(found, whole, t):
            one = torch.ones_like(p[:, :1])
            logp = form.buffer("bonus", z).copy_(z) if request.entropy_bonus else None
            form.slope_alone(z, tp)
            weight = request.distill_weight * form.factor(one, one)
            if form.kind == "forward_kl":
                z.fill_(0.0)
                extra = self._extra_slope(logp, z, few[piece], entropy[piece])
                extra.add_(weight).mul_(p).sub_(q_.mul_(weight))
            else:
                z.sub_(found.center[piece]).mul_(weight)
                self._extra_slope(logp, z, few[piece], entropy[piece]).mul_(p)
        _scatter(whole, adds, first)
        return whole

    def _extra_slope(self, logp: Tensor | None, z: Tensor | None, few: Tensor, entropy: Tensor) -> Tensor:
        """z + c (log p + H) − few, in z, or in log p where there is no z."""
        bonus = self.request.entropy_bonus
        if z is None:
            assert logp is not None
            return logp.add_(entropy).mul_(bonus).sub_(few) if bonus else logp.zero_().sub_(few)
        if logp is not None:
            z.add_(logp.add_(entropy), alpha=bonus)
        return z.sub_(few)

    def _through_products(self, gradient: Tensor, span: slice, first: int) -> None:
        out, last = self.gradients, first + gradient.shape[1]
        if out.bias is not None:
            out.bias[first:last] += gradient.sum(0)
        if out.hidden is not None:
            self.head.hidden_grad(gradient, out.hidden[span], first, accumulate=True)
        if out.weight is not None:
            hidden = self.request.hidden[span].to(self.request.dtype)
            self.head.weight_grad(gradient, hidden, out.weight[first:last], accumulate=span.start > 0)

    def _mend(self, index: Tensor, bad: Tensor, rows: Rows) -> None:
        """Whole rows of those tokens alone, one after the other, through `losses`."""
        request, out = self.request, self.gradients
        for one in bad.split(1):
            token = index[one]
            z = self.head.logits(request.hidden[token], self.z_buffer.new_empty(1, self.head.columns), -torch.inf)
            mended = by_autograd(request, z, self._whole_teacher(token), token, gradient=request.needs.any)
            rows.replace(one, mended)
            weight = request.token_weights[token] / request.objective.student_temperature
            if out.hidden is not None:
                row = torch.empty_like(out.hidden[token])
                self.head.hidden_grad(z, row)
                out.hidden[token] = row * weight
            if out.weight is not None:
                hidden = request.hidden[token].to(request.dtype) * weight
                self.head.weight_grad(z, hidden, out.weight[: self.head.columns], accumulate=True)
            if out.bias is not None:
                out.bias[: self.head.columns] += z[0] * weight

    def _whole_teacher(self, token: Tensor) -> list[tuple[Tensor | None, Tensor]]:
        target = self.request.target
        if isinstance(target, HiddenTarget):
            assert self.teacher is not None
            t = self.z_buffer.new_empty(1, self.head.columns)
            return [(None, self.teacher.logits(target.hidden[token], t, -torch.inf))]
        if isinstance(target, DenseTarget):
            t = target.logits[token, : self.head.columns].to(self.request.dtype)
            return [(None, self.head.mask(t / self.request.objective.teacher_temperature, -torch.inf))]
        return []


def _pick(z: Tensor, ids: Tensor, first: int, into: Tensor) -> None:
    """into[row, k] = z[row, ids[row, k] − first] where that column is in the block."""
    column = ids - first
    here = (column >= 0) & (column < z.shape[1])
    into.copy_(torch.where(here, z.gather(-1, torch.where(here, column, 0)), into))


def _scatter(z: Tensor, adds: list[tuple[Tensor, Tensor]], first: int) -> None:
    for ids, values in adds:
        column = ids - first
        here = (column >= 0) & (column < z.shape[1])
        z.scatter_add_(-1, torch.where(here, column, 0), torch.where(here, values, 0.0))

"""The walk over token chunks: two logits products, one row pass, two gradient products, in buffers that are made once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from opd.errors import ObjectiveError
from opd.kernels.generic import by_autograd, watch_all
from opd.kernels.normal import pieces
from opd.kernels.products import Head
from opd.kernels.request import Answer, Request, TeacherMixture
from opd.kernels.rows import Rows
from opd.types import DenseTarget, HiddenTarget

ROW_MULTIPLE = 8  # products of other heights leave part of a vector register idle
FILTER_PAYS = 0.6  # share of the columns above which gathering them costs more than the products it saves


class RowPass(Protocol):
    """d(loss)/d(logits) from logits, in place, for the rows `index` of the request."""

    fill: float
    """What masked logits should be: −inf where the pass minds them, MASKED where they just drop out."""
    watches: bool
    """Whether the pass makes the request's diagnostics itself."""

    def __call__(
        self, z: Tensor, teachers: Sequence[tuple[Tensor | None, Tensor]], index: Tensor, *, gradient: bool
    ) -> Rows: ...


class TeacherRows:
    """Teacher logits of a chunk, divided by the teacher's temperature."""

    def __init__(self, request: Request, masked: Tensor, rows: int) -> None:
        target = request.target
        self.request = request
        self.members: list[HiddenTarget | DenseTarget] = []
        self.mixture: TeacherMixture | None = None
        if isinstance(target, (HiddenTarget, DenseTarget)):
            self.members = [target]
        elif isinstance(target, TeacherMixture):
            self.members, self.mixture = list(target.targets), target
        self.temperature = request.objective.teacher_temperature
        self.masked = masked
        self.heads = [self._head(member) for member in self.members]
        apart = self.mixture is None or self.mixture.mixture == "loss"
        count = len(self.members) if apart else min(2, len(self.members))
        columns = local_columns(request)
        self.buffers = [_buffer(request, rows, columns) for _ in range(count)]

    def _head(self, member: HiddenTarget | DenseTarget) -> Head | None:
        if isinstance(member, DenseTarget):
            return None
        head, columns = member.head, local_columns(self.request)
        return Head(
            head.weight[:columns],
            None if head.bias is None else head.bias[:columns],
            dtype=self.request.dtype,
            temperature=self.temperature,
            masked=_with_padding(self.masked, head.valid_vocab, self.request, columns),
        )

    def logits(self, index: slice | Tensor, rows: int, fill: float) -> list[tuple[Tensor | None, Tensor]]:
        """(weight per token, logits [rows, columns]) of each distribution that the student is compared with."""
        buffers = [buffer[:rows] if rows <= buffer.shape[0] else buffer.new_empty(rows, buffer.shape[1]) for buffer in self.buffers]  # fmt: skip
        if not self.members:
            return []
        if self.mixture is None:
            return [(None, self._member(0, index, buffers[0], fill))]
        weights = self.mixture.weights.to(self.request.dtype)
        per_token = weights.expand(rows, -1) if weights.dim() == 1 else weights[index]
        columns = per_token.unbind(-1)
        if self.mixture.mixture == "loss":
            return [(w, self._member(i, index, buffers[i], fill)) for i, w in enumerate(columns)]
        return [(None, self._mixed(columns, index, buffers, fill))]

    def _member(self, number: int, index: slice | Tensor, out: Tensor, fill: float) -> Tensor:
        member, head = self.members[number], self.heads[number]
        if head is not None:
            assert isinstance(member, HiddenTarget)
            return head.logits(member.hidden[index], out, fill)
        assert isinstance(member, DenseTarget)
        out.copy_(member.logits[index, : out.shape[1]])
        if self.temperature != 1.0:
            out.div_(self.temperature)
        return out.index_fill_(-1, self.masked, fill) if self.masked.numel() else out

    def _mixed(
        self, weights: Sequence[Tensor], index: slice | Tensor, buffers: Sequence[Tensor], fill: float
    ) -> Tensor:
        """log Σ w_i q_i, or Σ w_i log q_i up to a constant per row, which the row pass takes out."""
        assert self.mixture is not None
        total, other = buffers[0], buffers[-1]
        for number, weight in enumerate(weights):
            member = self._member(number, index, total if number == 0 else other, fill)
            member.sub_(self._log_normalizer(member))
            if self.mixture.mixture == "probability":
                member.add_(weight.log().unsqueeze(-1))
            else:
                member.mul_(weight.unsqueeze(-1))
                if fill == -math.inf:
                    member.nan_to_num_(nan=0.0, neginf=fill)  # 0 · −inf: a teacher of weight 0 says nothing
            if number and self.mixture.mixture == "probability":
                torch.logaddexp(total, member, out=total)
            elif number:
                total.add_(member)
        if self.masked.numel():
            total.index_fill_(-1, self.masked, fill)
        if fill == -math.inf and self.mixture.mixture == "logit" and bool((self._top(total) == fill).any()):
            raise ObjectiveError(
                "mixture='logit' has no tokens left at some position: every token is impossible for one of the teachers; "
                "use mixture='probability'."
            )
        return total

    def _top(self, logits: Tensor) -> Tensor:
        here = logits.amax(-1, keepdim=True) if logits.shape[1] else logits.new_full((len(logits), 1), -math.inf)
        return self.request.shards.max(here)[0]

    def _log_normalizer(self, logits: Tensor) -> Tensor:
        shards = self.request.shards
        if shards.alone:
            return logits.logsumexp(-1, keepdim=True)
        top = self._top(logits)
        (mass,) = shards.sum((logits - top).exp().sum(-1, keepdim=True))
        return top + mass.log()


def local_columns(request: Request) -> int:
    """Columns of the student's weight that take part: all of a shard, or those below `vocab`."""
    return request.weight.shape[0] if not request.shards.alone else request.vocab


def masked_columns(request: Request) -> Tensor:
    """This rank's column numbers that must have probability 0."""
    ids = torch.tensor(request.masked_ids, dtype=torch.long, device=request.hidden.device)
    if request.shards.alone:
        return ids
    column, here = request.shards.local(ids)
    return _with_padding(column[here], request.vocab, request, request.weight.shape[0])


def _with_padding(masked: Tensor, valid: int | None, request: Request, columns: int) -> Tensor:
    first = columns if valid is None else min(columns, max(0, valid - request.shards.offset))
    padding = torch.arange(first, columns, device=masked.device)
    return torch.cat([masked[masked < first], padding])


def _buffer(request: Request, rows: int, columns: int) -> Tensor:
    return torch.empty(rows, columns, dtype=request.dtype, device=request.hidden.device)


def student_head(request: Request, masked: Tensor) -> Head:
    """The student's output layer over the columns that take part."""
    columns = local_columns(request)
    return Head(
        request.weight[:columns],
        None if request.bias is None else request.bias[:columns],
        dtype=request.dtype,
        temperature=request.objective.student_temperature,
        masked=masked,
    )


def chunk_of(request: Request) -> int:
    """Rows per chunk: at most `chunk_tokens`, even in size, and a multiple of 16 where that is no more."""
    chunks = max(1, math.ceil(request.tokens / request.chunk_tokens))
    even = max(1, math.ceil(request.tokens / chunks))
    return min(request.chunk_tokens, request.tokens or 1, math.ceil(even / ROW_MULTIPLE) * ROW_MULTIPLE)


class Gradients:
    """Accumulators of the gradient products; a product whose result nobody wants is not run."""

    def __init__(self, request: Request, head: Head) -> None:
        self.request, self.head = request, head
        self.temperature = request.objective.student_temperature
        needs, hidden, dtype = request.needs, request.hidden, request.dtype
        device, columns = hidden.device, head.columns
        self.hidden = torch.empty(hidden.shape, dtype=dtype, device=device) if needs.hidden else None
        self.weight = torch.empty(request.weight.shape, dtype=dtype, device=device) if needs.weight else None
        self.bias = torch.zeros(len(request.weight), dtype=dtype, device=device) if needs.bias else None
        if self.weight is not None:
            self.weight[columns:].zero_()
            if not request.tokens:
                self.weight.zero_()

    def add(self, gradient: Tensor, scale: Tensor, rows: slice) -> None:
        """`gradient` · scale is d(loss per token)/d(logits / temperature) of these rows."""
        scale = (scale * self.request.token_weights[rows] / self.temperature).unsqueeze(-1)
        if self.head.rounds_to_half:
            scale = scale / lifted(gradient)
        epsilon = self.request.gradient_filter
        keep = None if epsilon is None else self._above(gradient, scale, rows, epsilon)
        if self.bias is not None:
            self.bias[: self.head.columns] += torch.mv(gradient.T, scale.squeeze(-1))
        if self.hidden is not None:
            self._hidden(gradient, scale, rows, keep)
        if self.weight is not None:
            self._weight(gradient, scale, rows, keep)

    def _hidden(self, gradient: Tensor, scale: Tensor, rows: slice, keep: Tensor | None) -> None:
        assert self.hidden is not None
        out = self.hidden[rows]
        if keep is None:
            self.head.hidden_grad(gradient, out)
        else:
            torch.mm(gradient.index_select(1, keep), self.head.weight.index_select(0, keep).to(out.dtype), out=out)
        out.mul_(scale)

    def _weight(self, gradient: Tensor, scale: Tensor, rows: slice, keep: Tensor | None) -> None:
        assert self.weight is not None
        scaled = self.request.hidden[rows].to(self.request.dtype) * scale
        out = self.weight[: self.head.columns]
        if keep is None:
            self.head.weight_grad(gradient, scaled, out, accumulate=rows.start > 0)
            return
        if rows.start == 0:
            out.zero_()
        out.index_add_(0, keep, torch.mm(gradient.index_select(1, keep).T, scaled))

    def _above(self, gradient: Tensor, scale: Tensor, rows: slice, epsilon: float) -> Tensor | None:
        """Columns with an entry of |d(loss per token)/d(logits)| above the filter; None when nearly all have."""
        weights = self.request.token_weights[rows].unsqueeze(-1)
        unweighted = torch.where(weights == 0, 0.0, scale / weights)
        largest = gradient.new_zeros(gradient.shape[1])
        for piece in pieces(gradient):
            torch.maximum(largest, (gradient[piece] * unweighted[piece]).abs_().amax(0), out=largest)
        keep = (largest > epsilon).nonzero().squeeze(-1)
        return keep if len(keep) <= FILTER_PAYS * len(largest) else None

    def answer(self, rows: dict[str, Tensor]) -> Answer:
        """Gradients as they were accumulated, in the request's dtype; that of hidden is summed over shards."""
        hidden = self.hidden
        if hidden is not None:
            (hidden,) = self.request.shards.sum(hidden)
        return Answer(rows=rows, hidden_grad=hidden, weight_grad=self.weight, bias_grad=self.bias)


def lifted(gradient: Tensor) -> Tensor:
    """Each row times a power of two, in place, that brings its largest entry near 2^10, and these powers: float16 holds no number
    below 6e-8, and most of a row of a large vocabulary is."""
    top = torch.frexp(torch.linalg.vector_norm(gradient, math.inf, dim=-1, keepdim=True))
    power = torch.where(top.mantissa.isfinite(), torch.exp2((10 - top.exponent).to(gradient.dtype)), 1.0)
    gradient.mul_(power)
    return power


def walk(request: Request, make_pass: Callable[[int], RowPass]) -> Answer:
    """Every chunk of the request through `make_pass(chunk rows)`."""
    masked = masked_columns(request)
    head, chunk = student_head(request, masked), chunk_of(request)
    row_pass = make_pass(chunk)
    z_buffer = _buffer(request, chunk, head.columns)
    teacher = TeacherRows(request, masked, chunk)
    gradients = Gradients(request, head)
    wanted = request.needs.any
    done: list[Rows] = []
    for first in range(0, request.tokens, chunk):
        rows = slice(first, min(first + chunk, request.tokens))
        index = torch.arange(rows.start, rows.stop, device=request.hidden.device)
        z = head.logits(request.hidden[rows], z_buffer[: len(index)], row_pass.fill)
        teachers = teacher.logits(rows, len(index), row_pass.fill)
        apart = request.watch is not None and not row_pass.watches
        seen = watch_all(request, z, teachers, index) if apart else {}
        out = row_pass(z, teachers, index, gradient=wanted)
        if row_pass.fill != -math.inf:
            _mend(request, head, teacher, z, index, out, gradient=wanted)
        out.values |= seen
        if wanted:
            gradients.add(z, out.scale, rows)
        done.append(out)
    return gradients.answer(Rows.join(done, z_buffer).values)


def _mend(
    request: Request, head: Head, teacher: TeacherRows, z: Tensor, index: Tensor, out: Rows, *, gradient: bool
) -> None:
    """Rows whose loss or entropy is not finite are done again with −inf in its place and every case told apart."""
    bad = out.broken()
    if not len(bad):
        return
    again = index[bad]
    logits = head.logits(request.hidden[again], z.new_empty(len(bad), z.shape[1]), -math.inf)
    teachers = teacher.logits(again, len(bad), -math.inf)
    seen = watch_all(request, logits, teachers, again) if request.watch is not None else {}
    mended = by_autograd(request, logits, teachers, again, gradient=gradient)
    mended.values |= seen
    if gradient:
        z[bad] = logits
    out.replace(bad, mended)

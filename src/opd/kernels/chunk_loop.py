"""The loop over token chunks: logits of both models, one row pass that turns the student's into their gradient, its way out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from opd.errors import ObjectiveError
from opd.kernels.full_logits import diagnostics_of_rows, loss_by_autograd
from opd.kernels.head import OutputLayer, mask_columns
from opd.kernels.row_spec import RowResults, RowSpec, Teachers
from opd.types import DenseTarget, HiddenTarget, TeacherMixture


class StudentLogits(Protocol):
    """The source of the student's logits and the sink of their gradient: an output layer, or logits that somebody holds."""

    wants_gradient: bool

    def chunks(self) -> Iterable[Any]:
        """Indices of the tokens, a chunk at a time: slices or index tensors."""
        ...

    def buffer(self) -> Tensor:
        """Room for the logits of the largest chunk."""
        ...

    def logits(self, index: Any, out: Tensor, fill: float) -> Tensor:
        """Logits of the tokens `index`, divided by the temperature, into `out`; masked columns are `fill`."""
        ...

    def add_gradient(self, gradient: Tensor, scale: Tensor, rows: Any) -> None:
        """Take `gradient` · scale, which is d(loss per token)/d(logits / temperature). `gradient` may be used up."""
        ...


class RowPass(Protocol):
    """d(loss)/d(logits) from logits, in place, for the rows of a chunk."""

    fill: float
    """The value of masked logits: −inf where the pass minds them, MASKED where they just drop out."""
    makes_diagnostics: bool
    """True if the pass makes the diagnostics itself."""

    def __call__(self, rows: RowSpec, z: Tensor, teachers: Teachers, *, gradient: bool) -> RowResults: ...


def run_chunks(student: StudentLogits, rows: RowSpec, row_pass_of: Callable[[RowSpec, Tensor], RowPass]) -> RowResults:
    """Every row's results by name; the gradients go to `student`. `row_pass_of` gets the specification and a buffer of logits."""
    buffer = student.buffer()
    row_pass = row_pass_of(rows, buffer)
    teacher = TeacherLogits(rows, student.buffer)
    gradient, done = student.wants_gradient, []
    for index in student.chunks():
        chunk = rows.at(index, whole_targets=False)
        z = student.logits(index, buffer[: _length(index)], row_pass.fill)
        teachers = teacher.logits(index, len(z), row_pass.fill)
        apart = rows.diagnostics is not None and not row_pass.makes_diagnostics
        seen = diagnostics_of_rows(chunk, z, teachers) if apart else {}
        out = row_pass(chunk, z, teachers, gradient=gradient)
        if row_pass.fill != -math.inf:
            recompute_nonfinite_rows(student, teacher, rows, index, z, out)
        out.values |= seen
        if gradient:
            student.add_gradient(z, out.scale, index)
        done.append(out)
    return RowResults.join(done, buffer)


def recompute_nonfinite_rows(
    student: StudentLogits, teacher: TeacherLogits, rows: RowSpec, index: Any, z: Tensor, out: RowResults
) -> None:
    """Rows whose loss or entropy is not finite, once more: with −inf for masked logits, by autograd, every case told apart."""
    bad = out.nonfinite_rows()
    if not len(bad):
        return
    again = bad + index.start if isinstance(index, slice) else index[bad]
    logits = student.logits(again, z.new_empty(len(bad), z.shape[1]), -math.inf)
    teachers = teacher.logits(again, len(bad), -math.inf)
    chunk = rows.at(again, whole_targets=False)
    seen = diagnostics_of_rows(chunk, logits, teachers) if rows.diagnostics is not None else {}
    found = loss_by_autograd(chunk, logits, teachers, gradient=student.wants_gradient)
    found.values |= seen
    if student.wants_gradient:
        z[bad] = logits
    out.replace(bad, found)


def _length(index: slice | Tensor) -> int:
    return index.stop - index.start if isinstance(index, slice) else len(index)


class TeacherLogits:
    """Logits divided by the teacher's temperature, in buffers that are made once."""

    def __init__(self, rows: RowSpec, new_buffer: Callable[[], Tensor]) -> None:
        target, temperature = rows.target, rows.objective.teacher_temperature
        self.columns, self.temperature = rows.columns, temperature
        self.mixture = target if isinstance(target, TeacherMixture) else None
        self.members: list[HiddenTarget | DenseTarget] = []
        if isinstance(target, (HiddenTarget, DenseTarget)):
            self.members = [target]
        elif self.mixture is not None:
            self.members = list(self.mixture.targets)
        if not self.members:
            return
        apart = self.mixture is None or self.mixture.mixture == "loss"
        self.buffers = [new_buffer() for _ in (self.members if apart else self.members[:2])]
        self.dtype = dtype = self.buffers[0].dtype
        self.masked = rows.columns.masked(self.buffers[0].device)
        heads = [member.head if isinstance(member, HiddenTarget) else None for member in self.members]
        self.layers = [
            one and OutputLayer(one.weight, one.bias, columns=rows.columns, dtype=dtype, temperature=temperature)
            for one in heads
        ]

    def logits(self, index: slice | Tensor, rows: int, fill: float) -> Teachers:
        """Of the tokens `index`, `rows` in number; masked columns are `fill`. Empty without a teacher that has logits."""
        if not self.members:
            return []
        buffers = [buffer[:rows] if rows <= len(buffer) else buffer.new_empty(rows, self.columns.here) for buffer in self.buffers]  # fmt: skip
        if self.mixture is None:
            return [(None, self.member(0, index, buffers[0], fill))]
        weights = self.mixture.weights.to(self.dtype)
        per_token = (weights.expand(rows, -1) if weights.dim() == 1 else weights[index]).unbind(-1)
        if self.mixture.mixture == "loss":
            return [(w, self.member(i, index, buffers[i], fill)) for i, w in enumerate(per_token)]
        return [(None, self._mixed(per_token, index, buffers, fill))]

    def member(self, number: int, index: slice | Tensor, out: Tensor, fill: float, first: int = 0) -> Tensor:
        """One teacher's logits of the columns [first, first + out's width) into `out`."""
        member, layer = self.members[number], self.layers[number]
        if layer is not None:
            assert isinstance(member, HiddenTarget)
            return layer.logits(member.hidden[index], out, fill, first)
        assert isinstance(member, DenseTarget)
        out.copy_(member.logits[index, first : first + out.shape[1]])
        if self.temperature != 1.0:
            out.div_(self.temperature)
        return mask_columns(out, self.masked, fill, first, self.columns.here)

    def _mixed(
        self, weights: Sequence[Tensor], index: slice | Tensor, buffers: Sequence[Tensor], fill: float
    ) -> Tensor:
        """log Σ w_i q_i, or Σ w_i log q_i up to a constant per row, which the row pass takes out."""
        assert self.mixture is not None
        by_probability = self.mixture.mixture == "probability"
        total, other = buffers[0], buffers[-1]
        for number, weight in enumerate(weights):
            member = self.member(number, index, total if number == 0 else other, fill)
            member.sub_(self._log_normalizer(member))
            if by_probability:
                member.add_(weight.log().unsqueeze(-1))
            else:
                member.mul_(weight.unsqueeze(-1))
                if fill == -math.inf:
                    member.nan_to_num_(nan=0.0, neginf=fill)  # 0 · −inf: a teacher of weight 0 says nothing
            if number and by_probability:
                torch.logaddexp(total, member, out=total)
            elif number:
                total.add_(member)
        mask_columns(total, self.masked, fill, 0, self.columns.here)
        if fill == -math.inf and not by_probability and bool((self.columns.shards.top(total, fill) == fill).any()):
            raise ObjectiveError(
                "mixture='logit' has no tokens left at some position: every token is impossible for one of the teachers; "
                "use mixture='probability'."
            )
        return total

    def _log_normalizer(self, logits: Tensor) -> Tensor:
        shards = self.columns.shards
        if shards.alone:
            return logits.logsumexp(-1, keepdim=True)
        top = shards.top(logits, -math.inf)
        (mass,) = shards.sum((logits - top).exp().sum(-1, keepdim=True))
        return top + mass.log()

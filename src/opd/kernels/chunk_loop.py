"""The loop over token chunks: logits of both models, one row pass that turns the student's into their gradient, its way out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor

from opd.kernels.full_logits import diagnostics_of_rows, loss_by_autograd
from opd.kernels.row_results import RowResults
from opd.kernels.row_spec import RowSpec
from opd.kernels.teacher_logits import TeacherLogits, Teachers


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

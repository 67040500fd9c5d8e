"""memory="minimal": nothing larger than [tokens, block] exists beside the gradients; the logits are computed twice.

First the chunk loop, without gradient, gives every value and the sums of every row. Its whole rows are in the memory of the weight's
gradient, which nobody has written yet, hidden size / 2 tokens at a time; where the weight has none, a few rows at a time in a buffer.
Then the gradient of one block of columns after the other goes through the products: 6 of them for a whole teacher, 4 for top-k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from opd.errors import ObjectiveError
from opd.kernels.chunk_loop import HeadLogits, TeacherLogits, run_chunks
from opd.kernels.few_tokens import token_slopes
from opd.kernels.full_logits import loss_by_autograd
from opd.kernels.rows.closed_form import closed_form, closed_form_rows, has_closed_form
from opd.kernels.spec import MASKED, RowResults, RowSpec, target_has_logits
from opd.types import HiddenTarget, TeacherMixture

BLOCK_BYTES = 1 << 29  # of one block of logits, times the deeper hidden size: the products pack as many rows, that deep
MAX_BLOCK_BYTES = 2 << 20
MIN_WIDTH = 64
GPU_BLOCK_BYTES = 64 << 20  # on a GPU, where many small blocks take as long as few large ones, each
PIECE = 1 << 15  # entries of a row pass that stay in cache; three buffers of them are within the mode's few mebibytes
ROWS_BYTES = 4 << 20  # of the whole rows where no gradient's memory can hold them


def run_blocks(student: HeadLogits, rows: RowSpec) -> RowResults:
    """Every row's results; the gradients go to `student`. Raises ObjectiveError for what this mode does not do."""
    if not rows.columns.shards.alone or isinstance(rows.target, TeacherMixture) or not has_closed_form(rows):
        raise ObjectiveError(
            "memory='minimal' takes one teacher, a whole vocabulary, and a KL, JSD or skewed KL without teacher_logp_floor (or top-k, or "
            "sampled log-probs); use memory='fast', with a small chunk_tokens where memory is short. (In a recipe: train.loss_memory.)"
        )
    if rows.objective.token_clip is not None and target_has_logits(rows.target):
        raise ObjectiveError(
            "memory='minimal' takes no token_clip over a whole vocabulary; use memory='fast'. (In a recipe: train.loss_memory.)"
        )
    if rows.objective.eos_groups:
        raise ObjectiveError(
            "memory='minimal' takes no eos_groups; use memory='fast'. (In a recipe: train.loss_memory.)"
        )
    whole_rows = _WholeRows(student, 2 if target_has_logits(rows.target) else 1)
    found = run_chunks(whole_rows, rows, partial(closed_form_rows, for_blocks=student.wants_gradient))
    if student.wants_gradient:
        _Blocks(student, rows).add_gradient(found)
    return found


class _WholeRows:
    """The logits of `student` without gradient, in chunks of as many whole rows as there is memory for."""

    wants_gradient = False

    def __init__(self, student: HeadLogits, models: int) -> None:
        columns, weight = student.layer.columns, student.weight_grad
        self.student, self.columns = student, columns
        self.memory = None if weight is None else weight[:columns].view(-1)
        size = torch.finfo(student.head.dtype).bits // 8
        room = ROWS_BYTES // size if self.memory is None else self.memory.numel()
        self.chunk = max(1, min(student.chunk, room // (models * columns)))
        if self.memory is None or self.memory.numel() < models * columns:
            self.memory = torch.empty(
                models * self.chunk * columns, dtype=student.head.dtype, device=student.head.hidden.device
            )

    def chunks(self) -> Iterator[slice]:
        return self.student.chunks(self.chunk)

    def buffer(self) -> Tensor:
        assert self.memory is not None
        taken, self.memory = self.memory.split(
            [self.chunk * self.columns, len(self.memory) - self.chunk * self.columns]
        )
        return taken.view(self.chunk, self.columns)

    def logits(self, index: slice | Tensor, out: Tensor, fill: float) -> Tensor:
        return self.student.logits(index, out, fill)

    def gradient_room(self, index: slice, settle: Callable[[], None]) -> None:
        return None

    def add_gradient(self, gradient: Tensor, scale: Tensor, rows: slice) -> None:
        raise AssertionError("values alone are wanted of whole rows")


class _Blocks:
    """The gradient, a block of columns at a time, from the sums of rows that are known."""

    def __init__(self, student: HeadLogits, rows: RowSpec) -> None:
        self.student, self.rows, self.form = student, rows, closed_form(rows.objective)
        self.columns = student.layer.columns
        target, head = rows.target, student.head
        depth = max(head.hidden.shape[1], target.hidden.shape[1] if isinstance(target, HiddenTarget) else 0)
        size = torch.finfo(head.dtype).bits // 8
        block = GPU_BLOCK_BYTES if head.hidden.is_cuda else min(MAX_BLOCK_BYTES, BLOCK_BYTES // depth)
        self.width = min(self.columns, max(MIN_WIDTH, block // (size * student.chunk)))
        self.has_teacher = target_has_logits(target)
        self.z_buffer, self.t_buffer = (
            torch.empty(student.chunk * self.width if wanted else 0, dtype=head.dtype, device=head.hidden.device)
            for wanted in (True, self.has_teacher)
        )
        self.teacher = TeacherLogits(rows, lambda: self.t_buffer)

    def add_gradient(self, found: RowResults) -> None:
        """Of all rows, to the student's sums; rows that were recomputed are recomputed whole."""
        student, head = self.student, self.student.head
        if student.hidden_grad is not None:
            student.hidden_grad.zero_()
        for index in student.chunks():
            values = {name: value[index] for name, value in found.values.items()}
            state = {name: value[index] for name, value in found.state.items()}
            rows = self.rows.at(index, whole_targets=False)
            bad = state["log_s"].isnan().nonzero().squeeze(-1)
            weights = (head.token_weights[index] / head.temperature).unsqueeze(-1)
            adds = token_slopes(rows, state)
            for first in range(0, self.columns, self.width):
                gradient = self._block_gradient(rows, index, values, state, adds, first).mul_(weights)
                gradient[bad] = 0.0
                student.add_block_gradient(gradient, index, first)
            for row in bad.tolist():
                self._recompute(slice(index.start + row, index.start + row + 1))

    def _block_gradient(
        self,
        rows: RowSpec,
        index: slice,
        values: dict[str, Tensor],
        state: dict[str, Tensor],
        adds: list[tuple[Tensor, Tensor]],
        first: int,
    ) -> Tensor:
        """d(loss per token)/d(logits) of one block: p (w (f − Σ p f) + c (log p + H) − Σ_k F'_k), and F'_k at token k."""
        count, width = index.stop - index.start, min(self.width, self.columns - first)
        form, bonus = self.form, rows.entropy_bonus
        z, t = (buffer[: count * width].view(count, width) if len(buffer) else None for buffer in (self.z_buffer, self.t_buffer))  # fmt: skip
        assert z is not None
        self.student.layer.logits(self.student.head.hidden[index], z, MASKED, first)
        if t is not None:
            self.teacher.member(0, index, t, MASKED, first)
        known = {name: state[name].unsqueeze(-1) for name in ("log_s", "log_q", "center") if name in state}
        few = sum((slope.sum(-1, keepdim=True) for _, slope in adds), torch.zeros_like(known["log_s"]))
        entropy = values["student_entropy"].unsqueeze(-1)
        weight = rows.distill_weight * form.row_scale(few, few) if t is not None else 0.0
        step = count if z.is_cuda else max(1, PIECE // width)
        for piece in (slice(a, a + step) for a in range(0, count, step)):
            f = z[piece].sub_(known["log_s"][piece])
            p = torch.exp(f, out=form.buffer("p", f))
            logp = form.buffer("bonus", f).copy_(f) if bonus else None
            q_ = None
            if t is None:
                f.zero_()
            else:
                logq = t[piece].sub_(known["log_q"][piece])
                q_ = torch.exp(logq, out=form.buffer("q", f)) if form.teacher_share else None
                form.grad_wrt_probs_of_logp(f, logq)
                f.sub_(known["center"][piece]).mul_(weight)
            if logp is not None:
                f.add_(logp.add_(entropy[piece]), alpha=bonus)
            f.sub_(few[piece]).mul_(p)
            if q_ is not None:
                f.sub_(q_, alpha=weight * form.teacher_share)
        for ids, slope in adds:
            column = ids - first
            here = (column >= 0) & (column < width)
            z.scatter_add_(-1, torch.where(here, column, 0), torch.where(here, slope, 0.0))
        return z

    def _recompute(self, index: slice) -> None:
        """One whole row through `losses`."""
        z = self.z_buffer.new_empty(1, self.columns)
        self.student.logits(index, z, -math.inf)
        teachers = []
        if self.has_teacher:
            teachers = [(None, self.teacher.member(0, index, z.new_empty(z.shape), -math.inf))]
        out = loss_by_autograd(self.rows.at(index, whole_targets=False), z, teachers, gradient=True)
        self.student.add_gradient(z, out.scale, index)

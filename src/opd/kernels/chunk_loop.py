"""The loop over token chunks: logits of both models, one row pass that turns the student's into their gradient, its way out.

Logits are float32 whatever the operands, and so are the gradients' sums. Operands of 16 bits stay 16 bits on CUDA, where a product can
write float32 (`out_dtype`). Elsewhere the weight is widened a few rows at a time, which rounds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from opd.errors import ObjectiveError
from opd.kernels.eos_groups import MergedLogits
from opd.kernels.full_logits import diagnostics_of_rows, loss_by_autograd
from opd.kernels.spec import Columns, HeadSpec, RowPass, RowResults, RowSpec, Teachers, stored_tokens
from opd.losses.groups import merge_tokens_
from opd.types import DenseTarget, HiddenTarget, TeacherMixture

ROW_MULTIPLE = 8  # products of other heights leave part of a vector register idle
WHOLE_ENTRIES = 1 << 26  # of a weight whose gradient a product may write in 16 bits
WIDENED_ENTRIES = 1 << 20  # weight entries that are widened at a time: 4 MiB of float32
HALF_WEIGHT = 64.0  # largest token weight beside 16-bit floats: their products stay far from 65 504, and from the smallest numbers


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

    def gradient_room(self, index: Any, settle: Callable[[], None]) -> Tensor | None:
        """Where the row pass may write the gradient of these tokens, [tokens, columns], rounded; None: nowhere but over the logits.

        Rooms that were given are not read before `settle` has been called, or the loop is over.
        """
        ...

    def add_gradient(self, gradient: Tensor, scale: Tensor, rows: Any) -> None:
        """Take `gradient` · scale, which is d(loss per token)/d(logits / temperature). `gradient` may be used up."""
        ...


def run_chunks(student: StudentLogits, rows: RowSpec, row_pass_of: Callable[[RowSpec, Tensor], RowPass]) -> RowResults:
    """Every row's results by name; the gradients go to `student`. `row_pass_of` gets the specification and a buffer of logits."""
    if rows.objective.eos_groups:
        student, rows = MergedLogits(student, rows.objective.eos_groups), rows.with_first_ids()
    buffer = student.buffer()
    row_pass = row_pass_of(rows, buffer)
    teacher = TeacherLogits(rows, student.buffer)
    gradient, done, unsettled = student.wants_gradient, [], []

    def settle() -> None:
        """Look for rows to be done again in all chunks at once: to look is to wait for the device."""
        if unsettled and bool(torch.cat([out.nonfinite() for _, _, out in unsettled]).any()):
            for index, slopes, out in unsettled:
                recompute_nonfinite_rows(student, teacher, rows, index, slopes, out)
        unsettled.clear()

    for index in student.chunks():
        chunk = rows.at(index, whole_targets=False)
        z = student.logits(index, buffer[: _length(index)], row_pass.fill)
        teachers = teacher.logits(index, len(z), row_pass.fill)
        apart = rows.diagnostics is not None and not row_pass.makes_diagnostics
        seen = diagnostics_of_rows(chunk, z, teachers) if apart else {}
        room = student.gradient_room(index, settle) if gradient else None
        out = row_pass(chunk, z, teachers, gradient=gradient, room=room)
        slopes = z if out.gradient is None else out.gradient
        if row_pass.fill != -math.inf and (out.gradient is not None or not gradient):
            unsettled.append((index, slopes, out))
        elif row_pass.fill != -math.inf:
            recompute_nonfinite_rows(student, teacher, rows, index, slopes, out)
        out.values |= seen
        if gradient:
            student.add_gradient(slopes, out.scale, index)
        done.append(out)
    settle()
    return RowResults.join(done, buffer)


def recompute_nonfinite_rows(
    student: StudentLogits, teacher: TeacherLogits, rows: RowSpec, index: Any, slopes: Tensor, out: RowResults
) -> None:
    """Rows whose loss or entropy is not finite, once more: with −inf for masked logits, by autograd, every case told apart.

    Their gradient is put into `slopes`.
    """
    bad = out.nonfinite_rows()
    if not len(bad):
        return
    again = bad + index.start if isinstance(index, slice) else index[bad]
    logits = student.logits(again, out.scale.new_empty(len(bad), slopes.shape[1]), -math.inf)
    teachers = teacher.logits(again, len(bad), -math.inf)
    chunk = rows.at(again, whole_targets=False)
    seen = diagnostics_of_rows(chunk, logits, teachers) if rows.diagnostics is not None else {}
    found = loss_by_autograd(chunk, logits, teachers, gradient=student.wants_gradient)
    found.values |= seen
    if student.wants_gradient:
        slopes[bad] = logits.to(slopes.dtype)
    out.replace(bad, found)


def _length(index: slice | Tensor) -> int:
    return index.stop - index.start if isinstance(index, slice) else len(index)


class TeacherLogits:
    """Logits divided by the teacher's temperature, in buffers that are made once."""

    def __init__(self, rows: RowSpec, new_buffer: Callable[[], Tensor]) -> None:
        target, temperature = rows.target, rows.objective.teacher_temperature
        self.columns, self.temperature, self.groups = rows.columns, temperature, rows.objective.eos_groups
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
        found = self._logits(index, rows, fill)
        if self.groups:
            for _, logits in found:
                merge_tokens_(logits, self.groups, fill)
        return found

    def _logits(self, index: slice | Tensor, rows: int, fill: float) -> Teachers:
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


class HeadLogits:
    """Logits of hidden states, and where d(loss)/d(logits) goes: through the gradient products, into their sums.

    With `stored_tokens`, d(logits) of so many tokens is kept, as the products take it, and multiplied at once: sums of the weight's
    gradient are then not read and written for every chunk, and where all tokens fit they never exist apart from the gradient itself.
    """

    def __init__(self, head: HeadSpec) -> None:
        self.head = head
        self.layer = OutputLayer(
            head.weight, head.bias, columns=head.columns, dtype=head.dtype, temperature=head.temperature
        )
        chunks = max(1, math.ceil(head.tokens / head.chunk_tokens))
        even = math.ceil(max(1, math.ceil(head.tokens / chunks)) / ROW_MULTIPLE) * ROW_MULTIPLE
        self.chunk = min(head.chunk_tokens, head.tokens or 1, even)
        needs, blank = head.needs, {"dtype": head.dtype, "device": head.hidden.device}
        self.wants_gradient = needs.any
        self.hidden_grad = torch.empty(head.hidden.shape, **blank) if needs.hidden else None
        self.weight_grad = None
        self.bias_grad = torch.zeros(len(head.weight), **blank) if needs.bias else None
        self._weight_is_written = False
        stored = stored_tokens(head)
        flushes = math.ceil(head.tokens / stored) if stored else 0
        self._stored_tokens = math.ceil(head.tokens / flushes / self.chunk) * self.chunk if flushes else 0
        self._store: Tensor | None = None
        self._stored: list[tuple[slice, Tensor]] = []
        """Tokens and scales of the rows in the store, which are neighbours."""
        if needs.weight and (not flushes or head.tokens > self._stored_tokens):
            self.weight_grad = self._blank_weight_grad(head.dtype)

    def _blank_weight_grad(self, dtype: torch.dtype) -> Tensor:
        """Room for the weight's gradient; rows that are no columns are zeros."""
        blank = torch.empty(self.head.weight.shape, dtype=dtype, device=self.head.hidden.device)
        blank[self.layer.columns if self.head.tokens else 0 :].zero_()
        return blank

    def buffer(self) -> Tensor:
        """Room for the logits of a chunk."""
        return torch.empty(self.chunk, self.layer.columns, dtype=self.head.dtype, device=self.head.hidden.device)

    def chunks(self, rows: int | None = None) -> Iterator[slice]:
        """The tokens, `rows` at a time; by default in as few chunks as can be, even in size."""
        rows = rows or self.chunk
        for first in range(0, self.head.tokens, rows):
            yield slice(first, min(first + rows, self.head.tokens))

    def logits(self, index: slice | Tensor, out: Tensor, fill: float) -> Tensor:
        """Logits of some tokens into `out`; masked columns are `fill`."""
        return self.layer.logits(self.head.hidden[index], out, fill)

    def gradient_room(self, index: slice, settle: Callable[[], None]) -> Tensor | None:
        """Part of the store, where rounding is all that happens to d(logits) on its way there."""
        direct = self._stored_tokens and self.bias_grad is None and not self.layer.rounds_to_half
        return self._room(index, settle) if direct else None

    def _room(self, index: slice, settle: Callable[[], None] = lambda: None) -> Tensor:
        taken = sum(len(scale) for _, scale in self._stored)
        if taken + index.stop - index.start > self._stored_tokens:
            settle()
            self._multiply_stored()
            taken = 0
        if self._store is None:
            kind, size = self.layer.weight.dtype, (min(self._stored_tokens, self.head.tokens), self.layer.columns)
            self._store = torch.empty(size, dtype=kind, device=self.head.hidden.device)
        return self._store[taken : taken + index.stop - index.start]

    def add_gradient(self, gradient: Tensor, scale: Tensor, rows: slice) -> None:
        """Take `gradient` · scale, which is d(loss per token)/d(logits / temperature) of these rows."""
        head, columns = self.head, self.layer.columns
        scale = (scale * head.token_weights[rows] / head.temperature).unsqueeze(-1)
        if self.layer.rounds_to_half:
            scale = scale / lifted(gradient)
        if self.bias_grad is not None:
            self.bias_grad[:columns] += torch.mv(gradient.T, scale.squeeze(-1))
        if not self._stored_tokens:
            self._multiply(gradient, scale, rows)
            return
        room = self._room(rows)
        if gradient.data_ptr() != room.data_ptr():
            room.copy_(gradient)
        self._stored.append((rows, scale))

    def _multiply_stored(self) -> None:
        """The gradient products of the rows in the store."""
        if not self._stored:
            return
        assert self._store is not None
        rows = slice(self._stored[0][0].start, self._stored[-1][0].stop)
        scale = torch.cat([scale for _, scale in self._stored])
        self._stored = []
        self._multiply(self._store[: len(scale)], scale, rows)

    def _multiply(self, gradient: Tensor, scale: Tensor, rows: slice) -> None:
        head, columns = self.head, self.layer.columns
        if self.hidden_grad is not None:
            out = self.hidden_grad[rows]
            self.layer.hidden_grad(gradient, out)
            out.mul_(scale)
        if head.needs.weight:
            if self.weight_grad is None:
                self.weight_grad = self._blank_weight_grad(self.layer.gradient_dtype(head))
            scaled = head.hidden[rows].to(head.dtype, copy=True).mul_(scale)
            self.layer.weight_grad(gradient, scaled, self.weight_grad[:columns], accumulate=self._weight_is_written)
            self._weight_is_written = True

    def add_block_gradient(self, gradient: Tensor, rows: slice, first: int) -> None:
        """Take d(loss)/d(logits), token weights included, of the columns from `first` on; `hidden_grad` must begin as zeros."""
        last = first + gradient.shape[1]
        if self.bias_grad is not None:
            self.bias_grad[first:last] += gradient.sum(0)
        if self.hidden_grad is not None:
            self.layer.hidden_grad(gradient, self.hidden_grad[rows], first, accumulate=True)
        if self.weight_grad is not None:
            hidden = self.head.hidden[rows].to(self.head.dtype)
            self.layer.weight_grad(gradient, hidden, self.weight_grad[first:last], accumulate=rows.start > 0)
            self._weight_is_written = True

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden states (summed over shards), weight and bias, as they were accumulated."""
        self._multiply_stored()
        self._store = None
        hidden = self.hidden_grad
        if hidden is not None:
            (hidden,) = self.head.columns.shards.sum(hidden)
        return hidden, self.weight_grad, self.bias_grad


class OutputLayer:
    """hidden @ weight.T + bias over the columns that both models have."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, columns: Columns, dtype: torch.dtype, temperature: float
    ) -> None:
        """`temperature` divides the logits (through the hidden rows, which are fewer)."""
        self.columns = columns.here
        self.weight = weight[: self.columns]
        self.dtype = dtype
        self.temperature = temperature
        self.bias = None if bias is None else bias[: self.columns].to(dtype) / temperature
        self.masked = columns.masked(weight.device)
        self.same = weight.dtype == dtype
        self.mixed = not self.same and weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)
        self.step = max(1, WIDENED_ENTRIES // max(1, weight.shape[1]))

    def gradient_dtype(self, head: HeadSpec) -> torch.dtype:
        """Of the weight's gradient where one product makes all of it: that in which it is wanted, if a product can write it.

        Of a large matrix no product adds parts that are rounded to 16 bits: it has tiles enough for the whole device.
        """
        direct = self.mixed and self.weight.dtype == torch.bfloat16 and self.weight.numel() >= WHOLE_ENTRIES
        return torch.bfloat16 if direct and head.weight_grad_dtype == torch.bfloat16 else head.dtype

    @property
    def rounds_to_half(self) -> bool:
        """True if d(logits) is rounded to float16 on its way through the gradient products."""
        return self.mixed and self.weight.dtype == torch.float16

    def logits(self, hidden: Tensor, out: Tensor, fill: float, first: int = 0) -> Tensor:
        """Logits of columns [first, first + out's width) into `out` [rows, width]; masked columns are `fill`."""
        last = first + out.shape[1]
        weight = self.weight[first:last]
        if self.mixed:
            torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=torch.float32, out=out)  # pyright: ignore[reportCallIssue]
            if self.temperature != 1.0:
                out.div_(self.temperature)
        else:
            hidden = hidden.to(self.dtype)
            if self.temperature != 1.0:
                hidden = hidden / self.temperature
            if self.same:
                torch.mm(hidden, weight.T, out=out)
            else:
                for a in range(0, weight.shape[0], self.step):
                    torch.mm(hidden, weight[a : a + self.step].to(self.dtype).T, out=out[:, a : a + self.step])
        if self.bias is not None:
            out.add_(self.bias[first:last])
        return mask_columns(out, self.masked, fill, first, self.columns)

    def hidden_grad(self, gradient: Tensor, out: Tensor, first: int = 0, accumulate: bool = False) -> None:
        """out (+)= gradient @ weight, [rows, hidden] in float32."""
        weight = self.weight[first : first + gradient.shape[1]]
        if self.same:
            torch.addmm(out, gradient, weight, beta=int(accumulate), out=out)
        elif self.mixed and accumulate:
            out.add_(torch.mm(gradient.to(weight.dtype), weight, out_dtype=torch.float32))  # pyright: ignore[reportCallIssue]
        elif self.mixed:
            torch.mm(gradient.to(weight.dtype), weight, out_dtype=torch.float32, out=out)  # pyright: ignore[reportCallIssue]
        else:
            if not accumulate:
                out.zero_()
            for a in range(0, weight.shape[0], self.step):
                out.addmm_(gradient[:, a : a + self.step], weight[a : a + self.step].to(out.dtype))

    def weight_grad(self, gradient: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None:
        """out (+)= gradient.T @ hidden, [columns, hidden] in float32, or as `gradient_dtype` says; `hidden` is float32 already."""
        if self.mixed:
            left, right = gradient.to(self.weight.dtype).T, hidden.to(self.weight.dtype)
            if not accumulate:
                wide = {} if out.dtype == left.dtype else {"out_dtype": torch.float32}
                torch.mm(left, right, out=out, **wide)  # pyright: ignore[reportCallIssue]
                return
            torch.addmm(out, left, right, beta=int(accumulate), out_dtype=torch.float32, out=out)  # pyright: ignore[reportCallIssue]
        else:
            torch.addmm(out, gradient.T, hidden, beta=int(accumulate), out=out)


def mask_columns(out: Tensor, masked: Tensor, fill: float, first: int, columns: int) -> Tensor:
    """Set those of the `masked` columns that are among [first, first + out's width) of all `columns`, in place."""
    if masked.numel():
        if out.shape[1] < columns:
            masked = masked[(masked >= first) & (masked < first + out.shape[1])] - first
        out.index_fill_(-1, masked, fill)
    return out


def lift(head: HeadSpec, *weights: Tensor) -> float:
    """A power of two that these weights per token are multiplied by beside float16 operands, where 1/N would vanish."""
    if torch.float16 not in (head.hidden.dtype, head.weight.dtype) or not head.tokens:
        return 1.0
    largest = max(float(each.abs().max()) for each in weights)
    return 2.0 ** (math.log2(HALF_WEIGHT) - math.frexp(largest)[1]) if 0.0 < largest < math.inf else 1.0


def lifted(gradient: Tensor) -> Tensor:
    """Each row times a power of two, in place, that brings its largest entry near 2^10, and these powers: float16 holds no number
    below 6e-8, and most of a row of a large vocabulary is."""
    top = torch.frexp(torch.linalg.vector_norm(gradient, math.inf, dim=-1, keepdim=True))
    power = torch.where(top.mantissa.isfinite(), torch.exp2((10 - top.exponent).to(gradient.dtype)), 1.0)
    gradient.mul_(power)
    return power


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Products of float32 in float32, whatever PyTorch has been told (TF32 keeps 10 of 23 bits, and so would the logits)."""
    backends: Any = torch.backends
    backend = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
    told = backend.fp32_precision
    if told in ("none", "ieee") and backends.fp32_precision in ("none", "ieee"):
        yield
        return
    # PyTorch has two settings that must agree: the one that was used is the one that is changed and put back.
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:
        legacy = None
    if legacy in (None, "highest"):
        backend.fp32_precision = "ieee"
    else:
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if legacy in (None, "highest"):
            backend.fp32_precision = told
        else:
            torch.set_float32_matmul_precision(legacy)

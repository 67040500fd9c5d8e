"""Divergences from whole logits: one number per token, whose gradient is written while the row is in hand.

The row passes are those of `kernels.impl.chunked`. The gradient of the logits is made in the forward pass, in the logits' dtype, so
that nothing of the [tokens, vocab] matrices has to be kept in float32, and so that a later in-place backward on the same logits
cannot change it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd.errors import ObjectiveError
from opd.kernels.forms import has_closed_form
from opd.kernels.generic import ByAutograd, by_autograd, watch_all
from opd.kernels.impl.chunked import ClosedForm
from opd.kernels.parallel import Shards
from opd.kernels.request import Needs, Request, TeacherMixture, Watch
from opd.kernels.rows import Rows
from opd.kernels.walk import TeacherRows, lifted, masked_columns
from opd.losses import Objective
from opd.teachers.vocabulary import VocabularyMatch
from opd.types import DenseTarget

CPU_CHUNK_BYTES = 8 << 20  # of one float32 buffer of rows
GPU_CHUNK_BYTES = 128 << 20
WATCHED = ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy", "overlap")


@dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """What was found at each position that was asked for."""

    loss: Tensor
    """Divergence in nats, [positions]; can be differentiated once with respect to the student's logits."""
    metrics: dict[str, Tensor]
    """`WATCHED` and the two log-probs of the response token at temperature 1, [positions] each, without gradient."""


def token_losses(
    student_logits: Tensor,
    teacher_logits: Sequence[Tensor],
    objective: Objective,
    *,
    positions: Tensor | None = None,
    response_ids: Tensor | None = None,
    teacher_weights: Tensor | None = None,
    mixture: str = "probability",
    student_scale: float = 1.0,
    vocab: int | None = None,
    masked_ids: tuple[int, ...] = (),
    watch: bool = True,
) -> TokenLosses:
    """`objective`'s divergence at `positions` of [tokens, vocab] logits; all positions when None.

    `response_ids` [tokens] are the tokens that followed; what the metrics say about one that is none of the common ones is of another.
    `student_scale` multiplies the student's logits first, which undoes a division
    by the rollout temperature. Ids from `vocab` on and `masked_ids` have probability 0 on both sides. Several teachers need
    `teacher_weights` (1 in sum) and a `mixture`: probability, logit or loss. Raises ObjectiveError for shapes that do not fit.
    """
    target = _target(student_logits, teacher_logits, teacher_weights, mixture)
    tokens, columns = student_logits.shape
    device = student_logits.device
    common = min(columns, *(t.shape[-1] for t in teacher_logits), columns if vocab is None else vocab)
    inside = VocabularyMatch(size=common, invalid_ids=masked_ids)
    ids = torch.zeros(tokens, dtype=torch.long, device=device) if response_ids is None else response_ids
    request = Request(
        hidden=student_logits.detach(),
        weight=student_logits.detach().new_empty(columns, 0),
        bias=None,
        target=target,
        objective=objective,
        token_weights=student_logits.new_ones(1),
        response_ids=inside.with_stand_ins(ids),
        vocab=common,
        masked_ids=masked_ids,
        needs=Needs(),
        shards=Shards(columns),
        chunk_tokens=_rows(student_logits),
        watch=Watch(target=target) if watch else None,
    )
    where = torch.arange(tokens, device=device) if positions is None else positions
    walker = _Walker(request, where, student_scale, torch.is_grad_enabled() and student_logits.requires_grad)
    loss = _Differentiable.apply(student_logits, walker)
    assert isinstance(loss, Tensor)
    return TokenLosses(loss=loss, metrics=walker.metrics)


def _target(
    student: Tensor, teachers: Sequence[Tensor], weights: Tensor | None, mixture: str
) -> DenseTarget | TeacherMixture:
    for number, logits in enumerate(teachers):
        if logits.dim() != 2 or student.dim() != 2 or logits.shape[0] != student.shape[0]:
            raise ObjectiveError(
                f"teacher_logits[{number}] is {tuple(logits.shape)} and student_logits {tuple(student.shape)}: both must be "
                "[tokens, vocab] over the same tokens."
            )
    targets = tuple(DenseTarget(logits=logits.detach()) for logits in teachers)
    if len(targets) == 1:
        return targets[0]
    if not targets or weights is None:
        raise ObjectiveError(
            "there must be a teacher, and several teachers need weights, one for each with a sum of 1."
        )
    return TeacherMixture(targets=targets, weights=weights.to(student.device), mixture=mixture)  # pyright: ignore[reportArgumentType]


def _rows(logits: Tensor) -> int:
    size = (GPU_CHUNK_BYTES if logits.is_cuda else CPU_CHUNK_BYTES) // (4 * max(1, logits.shape[-1]))
    return max(16, min(4096, size))


class _Walker:
    """One walk over the rows: their losses, diagnostics, and the gradient of the student's logits."""

    def __init__(self, request: Request, positions: Tensor, scale: float, gradient: bool) -> None:
        self.request, self.positions, self.gradient = request, positions, gradient
        self.factor = scale / request.objective.student_temperature
        self.metrics: dict[str, Tensor] = {}
        self.slopes: Tensor | None = None
        """The gradient of the logits, until somebody asks for it."""
        self.powers: Tensor | None = None
        """Of two, [positions], that rows of `slopes` are multiplied by where they are float16."""
        self.masked = masked_columns(request)

    def run(self, logits: Tensor) -> Tensor:
        request, gradient = self.request, self.gradient
        closed = has_closed_form(request)
        rows = request.chunk_tokens
        row_pass = ClosedForm(request, rows) if closed else ByAutograd(request)
        teacher = TeacherRows(request, self.masked, rows)
        buffer = torch.empty(rows, request.vocab, dtype=request.dtype, device=logits.device)
        slopes = torch.zeros_like(logits) if gradient else None
        done, powers = [], [buffer.new_zeros(0, 1)]
        for index in self.positions.split(rows):
            z = self._student(logits, index, buffer[: len(index)], row_pass.fill)
            teachers = teacher.logits(index, len(index), row_pass.fill)
            apart = request.watch is not None and not row_pass.watches
            seen = watch_all(request, z, teachers, index) if apart else {}
            out = row_pass(z, teachers, index, gradient=gradient)
            if closed:
                self._mend(logits, teacher, z, index, out, gradient)
            out.values |= seen
            if slopes is not None:
                z.mul_((out.scale * self.factor).unsqueeze(-1))
                if slopes.dtype == torch.float16:
                    powers.append(lifted(z))
                slopes[index, : request.vocab] = z.to(slopes.dtype)
            done.append(out)
        values = Rows.join(done, buffer).values
        empty = buffer.new_zeros(0)
        self.metrics = {name.removeprefix("watch/"): v for name, v in values.items() if name.startswith("watch/")}
        self.slopes = slopes
        if len(powers) > 1:
            self.powers = torch.cat(powers).squeeze(-1)
        return values.get("loss", empty)

    def _student(self, logits: Tensor, index: Tensor, out: Tensor, fill: float) -> Tensor:
        out.copy_(logits[index, : out.shape[1]])
        if self.factor != 1.0:
            out.mul_(self.factor)
        return out.index_fill_(-1, self.masked, fill) if self.masked.numel() else out

    def _mend(self, logits: Tensor, teacher: TeacherRows, z: Tensor, index: Tensor, out: Rows, gradient: bool) -> None:
        """Rows with a probability of 0 somewhere are done again, every case told apart."""
        bad = out.broken()
        if not len(bad):
            return
        again = index[bad]
        fresh = self._student(logits, again, z.new_empty(len(bad), z.shape[1]), -math.inf)
        teachers = teacher.logits(again, len(bad), -math.inf)
        seen = watch_all(self.request, fresh, teachers, again) if self.request.watch is not None else {}
        mended = by_autograd(self.request, fresh, teachers, again, gradient=gradient)
        mended.values |= seen
        if gradient:
            z[bad] = fresh
        out.replace(bad, mended)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(student_logits: Tensor, walker: _Walker) -> Tensor:
        with torch.no_grad(), torch.autocast(student_logits.device.type, enabled=False):
            return walker.run(student_logits.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Walker], output: Tensor) -> None:
        ctx.walker = inputs[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = _HandOut.apply(grad, ctx.walker)
        assert isinstance(found, Tensor)
        return found, None


class _HandOut(torch.autograd.Function):
    """The gradient of the logits: a function of its own, so that torch.func shows it plain tensors."""

    @staticmethod
    def forward(grad: Tensor, walker: _Walker) -> Tensor:
        slopes, walker.slopes = walker.slopes, None  # scaled in place: another copy would be as large as the logits
        if slopes is None:
            raise RuntimeError("this loss can be differentiated once; compute it again for a second backward pass.")
        weights = grad.float() / walker.powers if walker.powers is not None else grad
        everywhere = torch.zeros(slopes.shape[0], dtype=weights.dtype, device=weights.device)
        everywhere[walker.positions] = weights
        if slopes.dtype in (torch.float16, torch.bfloat16):
            # In float32: in float16 a weight of 1/N, without a loss scale, would vanish, and one rounded to bfloat16 changes the
            # gradient's length. A product of two dtypes copies what it is given, so a few rows at a time.
            size = _rows(slopes)
            for rows, weight in zip(slopes.split(size), everywhere.float().split(size), strict=True):
                rows.mul_(weight.unsqueeze(-1))
        else:
            slopes.mul_(everywhere.unsqueeze(-1))
        return slopes.index_fill_(0, walker.positions[grad == 0], 0.0)  # also where the loss is NaN

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("this loss has first derivatives only.")

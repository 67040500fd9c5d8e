"""Divergences from whole logits: one number per token, whose gradient is written while the row is in hand.

The row passes are those of `kernels.rows`. The gradient of the logits is made in the forward pass, in the logits' dtype, so
that nothing of the [tokens, vocab] matrices has to be kept in float32, and so that a later in-place backward on the same logits
cannot change it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd.errors import ObjectiveError
from opd.kernels.chunk_loop import lifted, mask_columns, run_chunks
from opd.kernels.rows.autograd import AutogradRows
from opd.kernels.rows.closed_form import closed_form_rows, has_closed_form
from opd.kernels.spec import Columns, Diagnostics, RowSpec
from opd.losses import Objective
from opd.teachers.vocabulary import VocabularyMatch
from opd.types import DenseTarget, TeacherMixture

CPU_CHUNK_BYTES = 8 << 20  # of one float32 buffer of rows
GPU_CHUNK_BYTES = 128 << 20
WATCHED = ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy", "overlap")


@dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """The losses and metrics of each position that was asked for."""

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
    rows = RowSpec(
        columns=Columns.whole(common, masked_ids),
        objective=objective,
        target=target,
        response_ids=inside.with_stand_ins(ids),
        diagnostics=Diagnostics(target=target) if watch else None,
    )
    where = torch.arange(tokens, device=device) if positions is None else positions
    held = _HeldLogits(rows, where, student_scale, torch.is_grad_enabled() and student_logits.requires_grad)
    loss = _Differentiable.apply(student_logits, held)
    assert isinstance(loss, Tensor)
    return TokenLosses(loss=loss, metrics=held.metrics)


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


class _HeldLogits:
    """The student's logits at some positions, for the chunk loop, and their gradient."""

    def __init__(self, rows: RowSpec, positions: Tensor, scale: float, gradient: bool) -> None:
        self.rows, self.positions, self.wants_gradient = rows, positions, gradient
        self.factor = scale / rows.objective.student_temperature
        self.metrics: dict[str, Tensor] = {}
        self.slopes: Tensor | None = None
        """The gradient of the logits, until somebody asks for it."""
        self.powers: Tensor | None = None
        """Of two, [positions], that rows of `slopes` are multiplied by where they are float16."""
        self.held = torch.empty(0)

    def run(self, logits: Tensor) -> Tensor:
        """The loss of each position."""
        self.held = logits
        self.masked = self.rows.columns.masked(logits.device)
        self.slopes = torch.zeros_like(logits) if self.wants_gradient else None
        self._powers = [logits.new_zeros(0, 1, dtype=torch.float32)]
        values = run_chunks(self, self.rows, closed_form_rows if has_closed_form(self.rows) else AutogradRows).values
        self.held = torch.empty(0)
        names = [name for name in values if name.startswith("diagnostics/")]
        self.metrics = {name.removeprefix("diagnostics/"): values[name] for name in names}
        if len(self._powers) > 1:
            self.powers = torch.cat(self._powers).squeeze(-1)
        return values.get("loss", self._powers[0].view(0))

    def chunks(self) -> Iterator[Tensor]:
        yield from self.positions.split(_rows(self.held)) if len(self.positions) else ()

    def buffer(self) -> Tensor:
        dtype = torch.float64 if self.held.dtype == torch.float64 else torch.float32
        return torch.empty(_rows(self.held), self.rows.columns.here, dtype=dtype, device=self.held.device)

    def logits(self, index: Tensor, out: Tensor, fill: float) -> Tensor:
        out.copy_(self.held[index, : out.shape[1]])
        if self.factor != 1.0:
            out.mul_(self.factor)
        return mask_columns(out, self.masked, fill, 0, out.shape[1])

    def gradient_room(self, index: Tensor, settle: Callable[[], None]) -> None:
        return None

    def add_gradient(self, gradient: Tensor, scale: Tensor, rows: Tensor) -> None:
        assert self.slopes is not None
        gradient.mul_((scale * self.factor).unsqueeze(-1))
        if self.slopes.dtype == torch.float16:
            self._powers.append(lifted(gradient))
        self.slopes[rows, : gradient.shape[1]] = gradient.to(self.slopes.dtype)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(student_logits: Tensor, held: _HeldLogits) -> Tensor:
        with torch.no_grad(), torch.autocast(student_logits.device.type, enabled=False):
            return held.run(student_logits.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _HeldLogits], output: Tensor) -> None:
        ctx.held = inputs[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = _HandOut.apply(grad, ctx.held)
        assert isinstance(found, Tensor)
        return found, None


class _HandOut(torch.autograd.Function):
    """The gradient of the logits: a function of its own, so that torch.func shows it plain tensors."""

    @staticmethod
    def forward(grad: Tensor, held: _HeldLogits) -> Tensor:
        slopes, held.slopes = held.slopes, None  # scaled in place: another copy would be as large as the logits
        if slopes is None:
            raise RuntimeError("this loss can be differentiated once; compute it again for a second backward pass.")
        weights = grad.float() / held.powers if held.powers is not None else grad
        everywhere = torch.zeros(slopes.shape[0], dtype=weights.dtype, device=weights.device)
        everywhere[held.positions] = weights
        if slopes.dtype in (torch.float16, torch.bfloat16):
            # In float32: in float16 a weight of 1/N, without a loss scale, would vanish, and one rounded to bfloat16 changes the
            # gradient's length. A product of two dtypes copies what it is given, so a few rows at a time.
            size = _rows(slopes)
            for rows, weight in zip(slopes.split(size), everywhere.float().split(size), strict=True):
                rows.mul_(weight.unsqueeze(-1))
        else:
            slopes.mul_(everywhere.unsqueeze(-1))
        return slopes.index_fill_(0, held.positions[grad == 0], 0.0)  # also where the loss is NaN

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("this loss has first derivatives only.")

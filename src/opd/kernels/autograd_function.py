"""The fused loss as a function that autograd and torch.func can differentiate: its gradients are made in the forward pass."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opd.errors import ObjectiveError
from opd.kernels.head import GradsNeeded, HeadLogits, HeadSpec, exact_float32
from opd.kernels.row_spec import Diagnostics, PolicyTerm, RowResults, RowSpec, target_has_logits
from opd.types import DenseTarget, Head, HiddenTarget, SampledTarget, TeacherMixture, TopKTarget

Run = Callable[[HeadLogits, RowSpec], RowResults]
"""Compute every row's results, and leave the gradients in the first argument."""

HALF_WEIGHT = 64.0  # largest token weight beside 16-bit floats: their products stay far from 65 504, and from the smallest numbers
HALF_TOP = 14  # a float16 gradient is kept with its largest entry below 2^14
HALF_ROUGH = 0.005  # share of a float16 gradient that rounding may take; normal numbers lose a twentieth of that

TARGETS = (HiddenTarget, Head, DenseTarget, TopKTarget, SampledTarget, TeacherMixture)
for specification in (HeadSpec, RowSpec, PolicyTerm, Diagnostics, *TARGETS):
    torch.export.register_dataclass(specification)  # torch.func swaps the tensors of what it knows alone


class Gradient:
    """The gradient of one input, from the forward pass to the backward pass.

    float16 has 5 bits of exponent, and 1/N of a million tokens leaves nothing of a gradient in it: it is kept times a power of two,
    which is undone in float32, together with the gradient of the sum (in which a loss scale arrives), before the one rounding.
    """

    def __init__(self, value: Tensor, lift: float, dtype: torch.dtype) -> None:
        """`value` is `lift` times the gradient, in the dtype of the accumulators, and is used up."""
        self.dtype = dtype
        self.scale: Tensor | None = None
        if dtype == torch.float16:
            top = torch.frexp(torch.linalg.vector_norm(value, math.inf)).exponent if value.numel() else None
            self.scale = value.new_ones(()) if top is None else torch.exp2((HALF_TOP - top).to(value.dtype))
            value.mul_(self.scale)
            self.scale = self.scale * lift
        elif lift != 1.0:
            value.mul_(1.0 / lift)
        self.value = value.to(dtype)

    def times(self, factor: Tensor) -> Tensor:
        """The gradient, times the gradient of the sum; in place."""
        if self.scale is None:
            if factor.is_cuda or float(factor) != 1.0:  # on CUDA, looking would wait for the device
                self.value.mul_(factor)
            return self.value
        factor = factor.to(self.scale.dtype) / self.scale
        lost, whole = torch.zeros_like(self.scale), torch.zeros_like(self.scale)
        for rows in self.value.split(1024):
            exact = rows.to(factor.dtype)
            rows.copy_(exact * factor)
            whole += exact.square().sum()
            lost += exact.sub_(rows.to(factor.dtype) / factor).square_().sum()
        share = float((lost / whole).sqrt())
        if HALF_ROUGH < share <= 1.0:
            warnings.warn(
                f"float16 rounds away {share:.1%} of a gradient of a fused loss, whose entries are near 6e-8, the smallest number that "
                "float16 holds. Multiply the loss by a large number before backward() and divide the gradients afterwards "
                "(torch.amp.GradScaler does), or use bfloat16.",
                stacklevel=2,
            )
        return self.value


class FusedCall:
    """The state of a call on its way through autograd; no container, because torch.func would copy one."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.names: list[str] = []
        self.gradients: list[Gradient | None] | None = None

    def named(self, outputs: Any) -> dict[str, Tensor]:
        """The outputs of `FusedLoss` by name: every row's results, and their weighted `sum`, which alone can be differentiated."""
        return dict(zip(self.names, outputs, strict=True))


class FusedLoss(torch.autograd.Function):
    """Gradients are made in the forward pass; backward hands them out, times the gradient of the sum.

    `head` holds the first three tensors too, detached, and as the products take them.
    """

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, head: HeadSpec, rows: RowSpec, call: FusedCall
    ) -> tuple[Tensor, ...]:
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False), exact_float32(hidden.device):
            up = lift(head, head.token_weights)
            lifted = replace(head, token_weights=head.token_weights * up)
            found, gradients = [], None
            for at, some, some_rows in _by_weight(lifted, rows):
                student = HeadLogits(some)
                out = call.run(student, some_rows) if some.tokens else _no_rows(some, some_rows)
                found.append((at, out.values))
                gradients = gradients or student.gradients()
            assert gradients is not None
            values = _one_row_per_token(head, found)
            loss = values["loss"]
            total = torch.where(head.token_weights == 0, 0.0, loss * head.token_weights).sum()
            call.gradients = _kept(gradients, (hidden, weight, bias), found[0][0], up)
        call.names = ["sum", *values]
        return (total, *(value.clone() for value in values.values()))  # not tensors of the caller's

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.call = inputs[5]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_sum: Tensor | None, *grad_rows: Tensor | None) -> tuple[Any, ...]:
        if any(grad is not None for grad in grad_rows):
            raise ObjectiveError(
                "backward reached a per-token output of a fused loss, which has no gradient: the weight's gradient was formed with "
                "token_weights and cannot be re-weighted per token. Pass the weights as token_weights (or PolicyTerm), differentiate "
                "`loss` only, and .detach() per-token values; for any other loss of log-probs use linear_log_prob."
            )
        if ctx.call.gradients is None:
            raise ObjectiveError(
                "a fused loss was differentiated twice; its gradients are made once, in the forward pass, and given away. Call the "
                "function again, or add the losses before one backward."
            )
        if grad_sum is None:
            ctx.call.gradients = None
            return (None,) * 6
        found = _HandOut.apply(grad_sum, ctx.call)
        assert isinstance(found, tuple)
        return (*found, None, None, None)


class _HandOut(torch.autograd.Function):
    """The gradients, times that of the sum: a function of its own, so that torch.func shows it plain tensors."""

    @staticmethod
    def forward(grad_sum: Tensor, call: FusedCall) -> tuple[Tensor | None, ...]:
        assert call.gradients is not None
        gradients, call.gradients = call.gradients, None
        return tuple(None if gradient is None else gradient.times(grad_sum) for gradient in gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise ObjectiveError(
            "a fused loss has first derivatives only; use impl='reference' logits and opd.losses for more."
        )


def lift(head: HeadSpec, *weights: Tensor) -> float:
    """A power of two that these weights per token are multiplied by beside float16 operands, where 1/N would vanish."""
    if torch.float16 not in (head.hidden.dtype, head.weight.dtype) or not head.tokens:
        return 1.0
    largest = max(float(each.abs().max()) for each in weights)
    return 2.0 ** (math.log2(HALF_WEIGHT) - math.frexp(largest)[1]) if 0.0 < largest < math.inf else 1.0


def _by_weight(head: HeadSpec, rows: RowSpec) -> Iterator[tuple[Tensor | None, HeadSpec, RowSpec]]:
    """The tokens that count. Those of weight 0 take no part in a gradient, whatever they hold, and follow if there are diagnostics."""
    counted = head.token_weights != 0
    if bool(counted.all()):
        yield None, head, rows
        return
    index = counted.nonzero().squeeze(-1)
    yield index, head.at(index), rows.at(index)
    if rows.diagnostics is not None:
        index = (~counted).nonzero().squeeze(-1)
        yield index, replace(head.at(index), needs=GradsNeeded()), rows.at(index)


def _one_row_per_token(head: HeadSpec, found: list[tuple[Tensor | None, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """The results at their places; 0 where nothing was computed."""
    if found[0][0] is None:
        return found[0][1]
    rows: dict[str, Tensor] = {}
    for index, values in found:
        assert index is not None
        for name, value in values.items():
            rows.setdefault(name, head.hidden.new_zeros(head.tokens, dtype=value.dtype))
            rows[name].index_copy_(0, index, value.to(rows[name].dtype))
    return rows


def _kept(
    gradients: tuple[Tensor | None, ...], inputs: tuple[Tensor | None, ...], index: Tensor | None, up: float
) -> list[Gradient | None]:
    hidden, like = gradients[0], inputs[0]
    if hidden is not None and index is not None and like is not None:
        gradients = (hidden.new_zeros(like.shape).index_copy_(0, index, hidden), *gradients[1:])
    return [
        None if value is None or like is None else Gradient(value, up, like.dtype)
        for value, like in zip(gradients, inputs, strict=True)
    ]


def _no_rows(head: HeadSpec, rows: RowSpec) -> RowResults:
    """Of no token: each row's result that would be there."""
    target = rows.target
    names = ["loss", "student_entropy"]
    names += [] if target is None else ["divergence"]
    one = target_has_logits(target) and not (isinstance(target, TeacherMixture) and target.mixture == "loss")
    names += ["teacher_entropy"] if one else []
    names += [] if rows.response_ids is None else ["student_logp"]
    names += [] if rows.policy is None else ["policy_loss", "clipped"]
    none = head.token_weights.new_zeros(0, dtype=head.dtype)
    return RowResults(values=dict.fromkeys(names, none), scale=none)

"""The fused loss as a function that autograd and torch.func can differentiate: its gradients are made in the forward pass."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from opd.errors import ObjectiveError
from opd.kernels.products import exact_float32
from opd.kernels.request import Answer, Needs, PolicyTerm, Request, TeacherMixture, Watch, select_policy, select_target
from opd.types import DenseTarget, Head, HiddenTarget, SampledTarget, TopKTarget

HOLDERS = (Request, PolicyTerm, Watch, TeacherMixture, HiddenTarget, DenseTarget, TopKTarget, SampledTarget, Head)
"""What a request's tensors are in."""
HALF_WEIGHT = 64.0  # largest token weight beside 16-bit floats: their products stay far from 65 504, and from the smallest numbers
HALF_TOP = 14  # a float16 gradient is kept with its largest entry below 2^14
HALF_ROUGH = (
    0.005  # share of a float16 gradient that rounding may take; as a normal number it loses a twentieth of that
)


def apply(
    run: Callable[[Request], Answer],
    request: Request,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    operands: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Rows of the request by name, and their differentiable weighted `sum`. `operands` is what the student's side of the products is
    rounded to; None leaves it as it is."""
    call = _Call(run, request, operands)
    others: list[Tensor] = []

    def see(value: Tensor) -> Tensor:
        others.append(value.detach())
        return value

    _mapped(request, see)
    outputs = _Fused.apply(hidden, weight, bias, call, *others)
    assert isinstance(outputs, tuple)
    return dict(zip(call.names, outputs, strict=True))


class _Call:
    """What travels with a call through autograd. Not a container, of which torch.func would make a copy."""

    def __init__(self, run: Callable[[Request], Answer], request: Request, operands: torch.dtype | None) -> None:
        self.run, self.request, self.operands = run, request, operands
        self.names: list[str] = []
        self.gradients: list[Gradient | None] | None = None


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


class _Fused(torch.autograd.Function):
    """Gradients are made in the forward pass; backward hands them out, times the gradient of the sum."""

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call, *others: Tensor
    ) -> tuple[Tensor, ...]:
        """torch.func shows this function other tensors than its caller holds: `others` are those of the request, in their order."""
        operands, given = call.operands or hidden.dtype, iter(others)
        request = replace(
            _mapped(call.request, lambda _: next(given)),
            hidden=hidden.detach().to(operands),
            weight=weight.detach().to(operands),
            bias=None if bias is None else bias.detach(),
        )
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False), exact_float32(hidden.device):
            up = lift(request, request.token_weights)
            answer = _answer(call.run, replace(request, token_weights=request.token_weights * up))
            loss = answer.rows.get("loss")
            total = hidden.new_zeros((), dtype=request.dtype)
            if loss is not None:
                total = torch.where(request.token_weights == 0, 0.0, loss * request.token_weights).sum()
            rows = {name: value.clone() for name, value in answer.rows.items()}  # not tensors of the caller's
            found = (answer.hidden_grad, hidden), (answer.weight_grad, weight), (answer.bias_grad, bias)
            call.gradients = [
                None if value is None or like is None else Gradient(value, up, like.dtype) for value, like in found
            ]
        call.names = ["sum", *rows]
        del call.request
        return (total, *rows.values())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.inputs = inputs[3], len(inputs)

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
            return (None,) * ctx.inputs
        found = _HandOut.apply(grad_sum, ctx.call)
        assert isinstance(found, tuple)
        return (*found, *(None,) * (ctx.inputs - 3))


class _HandOut(torch.autograd.Function):
    """The gradients, times that of the sum: a function of its own, so that torch.func shows it plain tensors."""

    @staticmethod
    def forward(grad_sum: Tensor, call: _Call) -> tuple[Tensor | None, ...]:
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


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A request with each of its tensors changed, but for hidden states, weight and bias of the student."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_mapped(part, change) for part in value)
    if not isinstance(value, HOLDERS):
        return value
    own = {"hidden", "weight", "bias"} if isinstance(value, Request) else set()
    parts = {field.name: getattr(value, field.name) for field in fields(value) if field.name not in own}
    return replace(value, **{name: _mapped(part, change) for name, part in parts.items()})


def lift(request: Request, *weights: Tensor) -> float:
    """A power of two that these weights per token are multiplied by beside float16 operands, where 1/N would vanish."""
    if torch.float16 not in (request.hidden.dtype, request.weight.dtype) or not request.tokens:
        return 1.0
    largest = max(float(each.abs().max()) for each in weights)
    return 2.0 ** (math.log2(HALF_WEIGHT) - math.frexp(largest)[1]) if 0.0 < largest < math.inf else 1.0


def _answer(run: Callable[[Request], Answer], request: Request) -> Answer:
    """The request's answer with one row per token. Those of weight 0 take no part in a gradient, whatever they hold; where nobody wants
    their diagnostics they cost nothing and their rows are 0."""
    counted = request.token_weights != 0
    if bool(counted.all()):
        return run(request) if request.tokens else _empty(run, request)
    at = counted.nonzero().squeeze(-1)
    small = _at(request, at)
    answer = run(small) if small.tokens else _empty(run, small)
    parts = [(at, answer.rows)]
    if request.watch is not None:
        rest = (~counted).nonzero().squeeze(-1)
        parts.append((rest, run(replace(_at(request, rest), needs=Needs())).rows))
    rows = {
        name: request.hidden.new_zeros(request.tokens, dtype=value.dtype)
        for _, own in parts
        for name, value in own.items()
    }
    for index, own in parts:
        for name, value in own.items():
            rows[name].index_copy_(0, index, value.to(rows[name].dtype))
    hidden = answer.hidden_grad
    if hidden is not None:
        hidden = hidden.new_zeros(request.hidden.shape).index_copy_(0, at, hidden)
    return Answer(rows=rows, hidden_grad=hidden, weight_grad=answer.weight_grad, bias_grad=answer.bias_grad)


def _empty(run: Callable[[Request], Answer], request: Request) -> Answer:
    """Of no token: gradients are 0, and each row that would be told is there."""
    answer = run(request)
    none = request.token_weights.new_zeros(0, dtype=request.dtype)
    return replace(answer, rows=dict.fromkeys(_row_names(request), none))


def _at(request: Request, index: Tensor) -> Request:
    """The request at some of its tokens."""
    watch = request.watch
    return replace(
        request,
        hidden=request.hidden[index],
        target=select_target(request.target, index),
        token_weights=request.token_weights[index],
        response_ids=None if request.response_ids is None else request.response_ids[index],
        sampler_logp=None if request.sampler_logp is None else request.sampler_logp[index],
        policy=select_policy(request.policy, index),
        watch=None if watch is None else Watch(target=select_target(watch.target, index), eos_ids=watch.eos_ids),
    )


def _row_names(request: Request) -> list[str]:
    """What is told about a token, for when there is none to tell it about."""
    target = request.target
    names = ["loss", "student_entropy"]
    names += [] if target is None else ["divergence"]
    whole = isinstance(target, (HiddenTarget, DenseTarget))
    names += ["teacher_entropy"] if whole or (isinstance(target, TeacherMixture) and target.mixture != "loss") else []
    names += [] if request.response_ids is None else ["student_logp"]
    return names if request.policy is None else [*names, "policy_loss", "clipped"]

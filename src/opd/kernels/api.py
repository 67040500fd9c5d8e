"""Hidden states and output layers in, a weighted divergence and its gradients out; the [tokens, vocab] matrix never exists."""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from opd.errors import MissingDependencyError, ObjectiveError
from opd.kernels.checks import check_finite, check_rows, check_shapes
from opd.kernels.chunk_loop import HeadLogits, exact_float32, lift, run_chunks
from opd.kernels.minimal import run_blocks
from opd.kernels.rows.autograd import AutogradRows
from opd.kernels.rows.closed_form import closed_form_rows, has_closed_form
from opd.kernels.rows.reference import run_whole
from opd.kernels.spec import (
    Diagnostics,
    GradsNeeded,
    HeadSpec,
    Memory,
    PolicyTerm,
    RowResults,
    RowSpec,
    head_spec,
    target_has_logits,
    under_autocast,
    unshard,
)
from opd.losses import Divergence, Objective, Tail, discounted_return
from opd.losses._shapes import Float, Int
from opd.types import AnyTarget, DenseTarget, Head, HiddenTarget, SampledTarget, TeacherMixture, TopKTarget

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Impl = Literal["auto", "reference", "chunked", "triton"]
Run = Callable[[HeadLogits, RowSpec], RowResults]
"""Compute every row's results, and leave the gradients in the first argument."""

HALF_TOP = 14  # a float16 gradient is kept with its largest entry below 2^14
HALF_ROUGH = 0.005  # share of a float16 gradient that rounding may take; normal numbers lose a twentieth of that

TARGETS = (HiddenTarget, Head, DenseTarget, TopKTarget, SampledTarget, TeacherMixture)
for specification in (HeadSpec, RowSpec, PolicyTerm, Diagnostics, *TARGETS):
    torch.export.register_dataclass(specification)  # torch.func swaps the tensors of what it knows alone


@dataclass(frozen=True, kw_only=True)
class LinearLoss:
    """A weighted sum of losses, and per-token results.

    Only `loss` can be differentiated. Backward through any of the per-token tensors raises: the gradient of the weight was
    formed with `token_weights`, and cannot be re-weighted token by token afterwards. Tokens of weight 0 are 0 in all of them.
    """

    loss: Float[Tensor, ""]
    """Σ w (λ D + policy − c H), nats."""
    per_token: Float[Tensor, " tokens"]
    """D alone, unweighted, in nats."""
    student_entropy: Float[Tensor, " tokens"]
    """In nats, at the loss temperature, like the three that follow."""
    teacher_entropy: Float[Tensor, " tokens"] | None
    """None where the target is not a whole distribution, or several."""
    student_logp: Float[Tensor, " tokens"] | None
    """Of the response token; None without `response_ids`."""
    policy_loss: Float[Tensor, " tokens"] | None = None
    """λ_rl · importance · clipped surrogate."""
    clipped: Float[Tensor, " tokens"] | None = None
    """1 where the ratio is clipped and the policy term has no gradient."""


def linear_divergence(
    student_hidden: Float[Tensor, "tokens hidden"],
    student_weight: Float[Tensor, "vocab hidden"],
    target: AnyTarget | None,
    *,
    divergence: Divergence = "reverse_kl",
    alpha: float | None = None,
    beta: float | None = None,
    normalize: bool | None = None,
    tail: Tail | None = None,
    estimator: Literal["k1", "k2", "k3"] = "k1",
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    token_weights: Float[Tensor, " tokens"] | None = None,
    response_ids: Int[Tensor, " tokens"] | None = None,
    sampler_logp: Float[Tensor, " tokens"] | None = None,
    bias: Float[Tensor, " vocab"] | None = None,
    valid_vocab: int | None = None,
    policy: PolicyTerm | None = None,
    entropy_bonus: float = 0.0,
    distill_weight: float = 1.0,
    impl: Impl = "auto",
    chunk_tokens: int | None = None,
    memory: Memory = "fast",
    group: ProcessGroup | None = None,
) -> LinearLoss:
    """Σ w [λ D(S, T) + policy − c H(S)] for S = softmax(student_hidden @ student_weight.T + bias) and the teacher T of `target`.

    Four matrix products in all, gradients included: they are formed in the forward pass, chunk by chunk of tokens, so
    `token_weights` (mask × 1/global count × importance) is an input; losses of the sampled token have their expected gradient only under
    weights that do not depend on it (`losses/README.md`, Reduction). Tokens of weight 0 cost nothing. A weight, a bias or hidden states
    without `requires_grad` skip their product. Logits, divergence and the accumulated gradients are float32 (float64 for
    float64 inputs) whatever the dtype of the operands.

    `target` is a HiddenTarget, a DenseTarget, a TopKTarget (with `tail`, see `losses.partial_divergence`), a SampledTarget (with
    `estimator`: k1 as an advantage and k2 as a loss for reverse_kl, k3 for forward_kl), a TeacherMixture, or None for the policy and
    entropy terms alone. The log-probs of the last-named targets are at temperature 1. Where vocabularies differ in size,
    rows beyond the smaller, beyond `valid_vocab` or beyond `Head.valid_vocab` are padding: −inf on both sides.

    `policy` adds reinforcement learning and `entropy_bonus` c ≥ 0 an entropy term to the same row pass, at no further product;
    `distill_weight` is λ. `memory="minimal"` computes the logits twice (two products more) and
    keeps nothing beyond the gradients but a few MiB. With `group`, `student_weight` (and a teacher's head, or logits) are
    this rank's rows of the vocabulary, in rank order and split alike; hidden states are the same on all ranks, and so is their
    gradient. A DTensor weight is gathered once.

    Raises ObjectiveError for what cannot be computed, before any product is run, and NonFiniteError for NaN or infinite inputs.
    Sources: gradients in the forward, arXiv 2410.10989; divergences, `losses/README.md`.
    """
    objective = _objective(
        target,
        divergence=divergence,
        alpha=alpha,
        beta=beta,
        normalize=normalize,
        tail=tail,
        estimator=estimator,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
    )
    weight, bias = unshard(student_weight), None if bias is None else unshard(bias)
    check_shapes(student_hidden, weight, bias, target, token_weights, response_ids, sampler_logp, policy)
    head = head_spec(
        student_hidden,
        weight,
        bias,
        target,
        token_weights=token_weights,
        valid_vocab=valid_vocab,
        temperature=objective.student_temperature,
        chunk_tokens=chunk_tokens,
        memory=memory,
        group=group,
    )
    rows = RowSpec(
        columns=head.columns,
        objective=objective,
        target=target,
        response_ids=response_ids,
        sampler_logp=None if sampler_logp is None else sampler_logp.detach(),
        policy=policy,
        entropy_bonus=entropy_bonus,
        distill_weight=distill_weight,
    )
    call = FusedCall(choose_run(impl, memory, head, rows))
    check_rows(rows, head.token_weights)
    check_finite(head.hidden, head.weight, head.bias, head.token_weights, rows)
    found = call.named(FusedLoss.apply(student_hidden, weight, bias, head, rows, call))
    return LinearLoss(
        loss=found["sum"],
        per_token=found.get("divergence", torch.zeros_like(found["loss"])),
        student_entropy=found["student_entropy"],
        teacher_entropy=found.get("teacher_entropy"),
        student_logp=found.get("student_logp"),
        policy_loss=found.get("policy_loss"),
        clipped=found.get("clipped"),
    )


def linear_objective(
    student_hidden: Float[Tensor, "tokens hidden"],
    student_weight: Float[Tensor, "vocab hidden"],
    target: AnyTarget | None,
    response_ids: Int[Tensor, " tokens"],
    objective: Objective,
    *,
    token_weights: Float[Tensor, " tokens"],
    policy: PolicyTerm | None = None,
    distill_weight: float = 1.0,
    bias: Float[Tensor, " vocab"] | None = None,
    valid_vocab: int | None = None,
    masked_ids: tuple[int, ...] = (),
    sampler_logp: Float[Tensor, " tokens"] | None = None,
    sequence_index: Int[Tensor, " tokens"] | None = None,
    eos_ids: tuple[int, ...] = (),
    impl: Impl = "auto",
    memory: Memory = "fast",
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Any `Objective` from hidden states: its weighted sum, the loss of every token, and `Objective.per_token`'s metrics.

    The trainer's call. `policy` adds reinforcement learning to the same row pass (and `policy_loss` and `clipped` to the metrics),
    `distill_weight` is λ of the distillation; with target None the policy term is alone. Metrics are at temperature 1, together with
    `eos_prob`, the probability of `eos_ids`. Only the sum can be differentiated. Inputs are not searched for NaN: the losses show it.
    With discount > 0 the later tokens' advantages are needed first, so log-probs take a pass of their own (one product more).

    `memory="minimal"` as in `linear_divergence`. Inside `torch.autocast`, float32 hidden states and weight are rounded to its dtype for the three products, as a linear layer's are;
    logits and the gradients' sums stay float32. (`linear_divergence` takes its operands as they are.)
    """
    if target is None:  # of the objective, only the temperature is about the student alone
        objective = Objective(student_temperature=objective.student_temperature)
    objective.check_given(sampler_logp, sequence_index)
    check_shapes(student_hidden, student_weight, bias, target, token_weights, response_ids, sampler_logp, policy)
    if policy is not None and objective.discount > 0:
        raise ObjectiveError(
            f"discount={objective.discount} makes the distillation a policy gradient of its own, which cannot share a pass with `policy`; "
            "add the advantages, or set discount=0."
        )
    head = head_spec(
        student_hidden,
        student_weight,
        bias,
        target,
        token_weights=token_weights,
        valid_vocab=valid_vocab,
        masked_ids=masked_ids,
        temperature=objective.student_temperature,
        chunk_tokens=chunk_tokens,
        memory=memory,
    )
    head = under_autocast(head)
    squared = objective.student_temperature**2 if objective.scale_by_t2 else 1.0
    rows = RowSpec(
        columns=head.columns,
        objective=replace(objective, scale_by_t2=False) if objective.scale_by_t2 else objective,
        target=_fitting(target, objective),
        response_ids=response_ids,
        sampler_logp=None if sampler_logp is None else sampler_logp.detach(),
        policy=policy,
        distill_weight=squared * distill_weight,
        diagnostics=Diagnostics(target=target, eos_ids=tuple(i for i in eos_ids if i < head.columns.vocab)),
    )
    check_rows(rows, head.token_weights)
    seen: dict[str, Tensor] = {}
    if objective.discount > 0:
        assert sequence_index is not None
        rows, seen = _with_returns(head, rows, sequence_index, impl, memory)
    call = FusedCall(choose_run(impl, memory, head, rows))
    found = seen | call.named(FusedLoss.apply(student_hidden, student_weight, bias, head, rows, call))
    names = {name: name.removeprefix("diagnostics/") for name in found if name.startswith("diagnostics/")}
    names |= {} if policy is None else {"policy_loss": "policy_loss", "clipped": "clipped"}
    metrics = {short: found[name].detach() for name, short in names.items()}
    metrics["clamped"] = found["clamped"].detach() if "clamped" in found else torch.zeros_like(found["loss"])
    return found["sum"], found["loss"].detach(), metrics


def choose_run(impl: Impl, memory: Memory, head: HeadSpec, rows: RowSpec) -> Run:
    """`auto` takes Triton on CUDA when it is installed, else PyTorch. A named implementation that cannot run raises."""
    for name, value, choices in (("impl", impl, get_args(Impl)), ("memory", memory, get_args(Memory))):
        if value not in choices:
            raise ObjectiveError(f"{name}={value!r} is not one of {', '.join(choices)}.")
    if memory == "minimal":
        if impl not in ("auto", "chunked"):
            raise ObjectiveError(f"memory='minimal' is an implementation of its own; use impl='auto', not '{impl}'.")
        return run_blocks
    has_triton = importlib.util.find_spec("triton") is not None
    if impl == "reference":
        if not rows.columns.shards.alone:
            raise ObjectiveError("impl='reference' works on whole vocabularies; use impl='chunked' with a group.")
        return run_whole
    if impl == "triton" or (impl == "auto" and head.hidden.is_cuda and has_triton):
        if not has_triton:
            raise MissingDependencyError(
                "impl='triton' needs Triton, which is not installed: pip install triton, or use impl='chunked'."
            )
        if not head.hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise ObjectiveError(
                f"impl='triton' runs on CUDA, but the hidden states are on {head.hidden.device}; use impl='chunked', or set "
                "TRITON_INTERPRET=1 to check the kernels slowly on a CPU."
            )
        from opd.kernels.rows.triton import TritonRows, has_kernels

        return partial(run_chunks, row_pass_of=TritonRows if has_kernels(rows) else AutogradRows)
    return partial(run_chunks, row_pass_of=closed_form_rows if has_closed_form(rows) else AutogradRows)


def _objective(target: AnyTarget | None, **settings: Any) -> Objective:
    estimator = settings.pop("estimator")
    if estimator != "k1" and not isinstance(target, SampledTarget):
        raise ObjectiveError(f"estimator='{estimator}' is what is made of a SampledTarget, and this is none; drop it.")
    if isinstance(target, TopKTarget):
        return Objective(support="teacher_top_k", top_k=max(1, target.ids.shape[-1]), **settings)
    if settings.pop("tail") is not None:
        raise ObjectiveError("tail says what happens outside a top-k support, and this target has none; drop it.")
    if isinstance(target, SampledTarget):
        delivery = "advantage" if estimator == "k1" else "loss"
        return Objective(support="sampled", estimator=estimator, delivery=delivery, **settings)
    return Objective(**settings)


@torch.no_grad()
def _with_returns(
    head: HeadSpec, rows: RowSpec, sequence_index: Tensor, impl: Impl, memory: Memory
) -> tuple[RowSpec, dict[str, Tensor]]:
    """Discounted advantages, as the policy term of rows without a teacher; and the diagnostics, which need one."""
    objective, frozen = rows.objective, replace(head, needs=GradsNeeded())

    def advantage(**changes: Any) -> dict[str, Tensor]:
        plain = replace(objective, discount=0.0, clip_range=None, token_clip=None, **changes)
        alone = replace(
            rows, objective=plain, target=_fitting(rows.target, plain), sampler_logp=None, distill_weight=1.0
        )
        call = FusedCall(choose_run(impl, memory, frozen, alone))
        return call.named(FusedLoss.apply(head.hidden, head.weight, head.bias, frozen, alone, call))

    seen = advantage(baseline="none")
    returns = discounted_return(-seen["loss"], sequence_index, objective.discount)
    if objective.baseline == "value":
        returns = returns + (seen["loss"] - advantage(baseline="value")["loss"])
    returns, seen["clamped"] = objective.bounded_advantage(returns, seen["clamped"])
    policy = PolicyTerm(
        advantages=returns,
        old_log_prob=rows.sampler_logp,
        clip_range=objective.clip_range,
        weight=rows.distill_weight,
    )
    seen = {name: value for name, value in seen.items() if name.startswith("diagnostics/") or name == "clamped"}
    bare = Objective(student_temperature=objective.student_temperature)
    return replace(rows, target=None, objective=bare, policy=policy, diagnostics=None), seen


def _fitting(target: AnyTarget | None, objective: Objective) -> AnyTarget | None:
    """The part of a top-k target that the objective reads: its likeliest tokens, or the response token alone."""
    if not isinstance(target, TopKTarget) or objective.baseline == "value":
        return target
    if objective.support == "sampled" and target.sampled_logp is not None:
        return SampledTarget(teacher_logp=target.sampled_logp)
    if objective.top_k is None or target.ids.shape[-1] <= objective.top_k:
        return target
    kept = target.teacher_logp.topk(objective.top_k, dim=-1)
    ids = target.ids.gather(-1, kept.indices)
    return TopKTarget(ids=ids, teacher_logp=kept.values, sampled_logp=target.sampled_logp)


# ---- the function that autograd and torch.func differentiate ------------------------------------------------------------


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
            _multiply(self.value, factor)
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


def _multiply(value: Tensor, factor: Tensor) -> None:
    """In place. On CUDA the device looks whether there is anything to do: to look from here would be to wait for it."""
    if value.is_cuda and importlib.util.find_spec("triton") is not None:
        from opd.kernels.rows.triton import multiply

        multiply(value, factor)
    elif value.is_cuda or float(factor) != 1.0:
        value.mul_(factor)


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

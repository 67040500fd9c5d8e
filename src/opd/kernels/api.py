"""Hidden states and output layers in, a weighted divergence and its gradients out; the [tokens, vocab] matrix never exists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from opd.errors import ObjectiveError
from opd.kernels.checks import check_finite, check_request, check_shapes, choose_impl, common_vocabulary
from opd.kernels.fused import apply
from opd.kernels.parallel import Shards
from opd.kernels.request import (
    Answer,
    AnyTarget,
    Impl,
    Memory,
    Needs,
    PolicyTerm,
    Request,
    Watch,
)
from opd.losses import Divergence, Objective, Tail, discounted_return
from opd.losses._shapes import Float, Int
from opd.types import SampledTarget, TopKTarget

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CPU_CHUNK_BYTES = 75 << 20  # of one logits buffer: 128 rows of 152k columns; with fewer the products lose speed
CPU_CHUNK_ROWS = (
    256  # more gain nothing on a CPU (benchmarks/LOG.md), unless rows are so short that calls cost more than work:
)
CPU_CACHED_BYTES = 4 << 20
GPU_CHUNK_BYTES = 640 << 20  # 1024 rows of 152k columns: fewer rows re-read dW too often, more cost memory
MAX_CHUNK = 8192
MINIMAL_CHUNK = 1024


@dataclass(frozen=True, kw_only=True)
class LinearLoss:
    """A weighted sum, and what was seen on the way.

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
    gradient_filter: float | None = None,
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
    `distill_weight` is λ. `memory="minimal"` walks blocks of the vocabulary twice (two products more; for a mixture with a frozen head,
    three) and keeps nothing beyond the gradients but a few MiB. `gradient_filter=ε` drops columns of d(logits) from the gradient
    products where no token of the chunk has |∂loss/∂z| > ε, loss unweighted: the gradient of a token's hidden state then errs by at
    most ε w Σ|W_v| over the dropped v, that of a row of the weight by ε Σ w |h|. With `group`, `student_weight` (and a teacher's head, or logits) are
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
    student_weight, bias = gathered(student_weight), None if bias is None else gathered(bias)
    if token_weights is None:
        token_weights = torch.ones(student_hidden.shape[:1], device=student_hidden.device)
    check_shapes(student_hidden, student_weight, bias, target, token_weights, response_ids, sampler_logp, policy)
    run = choose_impl(impl, memory, student_hidden, group)
    shards = Shards(student_weight.shape[0], group)
    request = Request(
        hidden=student_hidden.detach(),
        weight=student_weight.detach(),
        bias=None if bias is None else bias.detach(),
        target=target,
        objective=objective,
        token_weights=token_weights.detach().to(torch.promote_types(student_hidden.dtype, torch.float32)),
        response_ids=response_ids,
        sampler_logp=None if sampler_logp is None else sampler_logp.detach(),
        policy=policy,
        entropy_bonus=entropy_bonus,
        distill_weight=distill_weight,
        vocab=common_vocabulary(shards, target, valid_vocab),
        needs=wanted(student_hidden, student_weight, bias),
        shards=shards,
        chunk_tokens=chunk_tokens if chunk_tokens is not None else default_chunk(student_hidden, shards.size, memory),
        memory=memory,
        gradient_filter=gradient_filter,
    )
    check_request(request, impl)
    check_finite(request)
    rows = apply(run, request, student_hidden, student_weight, bias)
    return LinearLoss(
        loss=rows["sum"],
        per_token=rows.get("divergence", torch.zeros_like(rows["loss"])),
        student_entropy=rows["student_entropy"],
        teacher_entropy=rows.get("teacher_entropy"),
        student_logp=rows.get("student_logp"),
        policy_loss=rows.get("policy_loss"),
        clipped=rows.get("clipped"),
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
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Any `Objective` from hidden states: its weighted sum, the loss of every token, and `Objective.per_token`'s metrics.

    What a trainer calls. `policy` adds reinforcement learning to the same row pass (and `policy_loss` and `clipped` to the metrics),
    `distill_weight` is λ of the distillation; with target None the policy term is alone. Metrics are at temperature 1, together with
    `eos_prob`, the probability of `eos_ids`. Only the sum can be differentiated. Inputs are not searched for NaN: the losses show it.
    With discount > 0 the later tokens' advantages are needed first, so log-probs take a pass of their own (one product more).

    Inside `torch.autocast`, float32 hidden states and weight are rounded to its dtype for the three products, as a linear layer's are;
    logits and the gradients' sums stay float32. (`linear_divergence` takes its operands as they are.)
    """
    if target is None:  # of the objective, only the temperature is about the student alone
        objective = Objective(student_temperature=objective.student_temperature)
    objective.check_given(sampler_logp, sequence_index)
    operands = autocast_dtype(student_hidden)
    check_shapes(student_hidden, student_weight, bias, target, token_weights, response_ids, sampler_logp, policy)
    if policy is not None and objective.discount > 0:
        raise ObjectiveError(
            f"discount={objective.discount} makes the distillation a policy gradient of its own, which cannot share a pass with `policy`; "
            "add the advantages, or set discount=0."
        )
    shards = Shards(student_weight.shape[0])
    squared = objective.student_temperature**2 if objective.scale_by_t2 else 1.0
    request = Request(
        hidden=student_hidden.detach(),
        weight=student_weight.detach(),
        bias=None if bias is None else bias.detach(),
        target=_fitting(target, objective),
        objective=objective,
        token_weights=token_weights.detach().to(torch.promote_types(student_hidden.dtype, torch.float32)),
        response_ids=response_ids,
        sampler_logp=None if sampler_logp is None else sampler_logp.detach(),
        policy=policy,
        distill_weight=squared * distill_weight,
        vocab=common_vocabulary(shards, target, valid_vocab),
        masked_ids=masked_ids,
        needs=wanted(student_hidden, student_weight, bias),
        shards=shards,
        chunk_tokens=chunk_tokens if chunk_tokens is not None else default_chunk(student_hidden, shards.size, "fast"),
        watch=Watch(target=target, eos_ids=eos_ids),
    )
    check_request(request, impl)
    run = choose_impl(impl, "fast", student_hidden, None)
    seen: dict[str, Tensor] = {}
    if objective.discount > 0:
        request, seen = _with_returns(request, sequence_index, run, operands)
    rows = {**seen, **apply(run, request, student_hidden, student_weight, bias, operands)}
    metrics = {name.removeprefix("watch/"): rows[name].detach() for name in rows if name.startswith("watch/")}
    if policy is not None:
        metrics |= {name: rows[name].detach() for name in ("policy_loss", "clipped")}
    metrics["clamped"] = rows["clamped"].detach() if "clamped" in rows else torch.zeros_like(rows["loss"])
    return rows["sum"], rows["loss"].detach(), metrics


def default_chunk(hidden: Tensor, columns: int, memory: Memory) -> int:
    """Tokens per chunk: as many as fit the device's budget, and on a CPU no more than pay."""
    if memory == "minimal":
        return MINIMAL_CHUNK
    row = max(1, columns) * (8 if hidden.dtype == torch.float64 else 4)
    if hidden.is_cuda:
        return max(64, min(MAX_CHUNK, GPU_CHUNK_BYTES // row // 64 * 64))
    useful = max(CPU_CHUNK_ROWS, CPU_CACHED_BYTES // row)
    return max(16, min(MAX_CHUNK, useful, CPU_CHUNK_BYTES // row // 16 * 16))


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
    request: Request, sequence_index: Tensor | None, run: Callable[[Request], Answer], operands: torch.dtype | None
) -> tuple[Request, dict[str, Tensor]]:
    """Discounted advantages, as the policy term of a request without a teacher; and the diagnostics, which need one."""
    objective = request.objective
    assert sequence_index is not None

    def advantage(**changes: Any) -> dict[str, Tensor]:
        plain = replace(objective, discount=0.0, clip_range=None, **changes)
        fed = _fitting(request.target, plain)
        changed = replace(request, objective=plain, target=fed, sampler_logp=None, needs=Needs(), distill_weight=1.0)
        return apply(run, changed, request.hidden, request.weight, request.bias, operands)

    seen = advantage(baseline="none")
    returns = discounted_return(-seen["loss"], sequence_index, objective.discount)
    if objective.baseline == "value":
        returns = returns + (seen["loss"] - advantage(baseline="value")["loss"])
    policy = PolicyTerm(
        advantages=returns,
        old_log_prob=request.sampler_logp,
        clip_range=objective.clip_range,
        weight=request.distill_weight,
    )
    bare = Objective(student_temperature=objective.student_temperature)
    return replace(request, target=None, objective=bare, policy=policy, watch=None), seen


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


def autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    """What autocast would round a float32 operand of a product to; None where it is off, or the operand is none."""
    kind = hidden.device.type
    if hidden.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def gathered(weight: Tensor) -> Tensor:
    """A DTensor's whole value. Ranks work on tokens of their own, so its gradient is the sum over them."""
    if not hasattr(weight, "full_tensor"):
        return weight
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(weight, DTensor)
    return weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)


def wanted(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Needs:
    on = torch.is_grad_enabled()
    return Needs(
        hidden=on and hidden.requires_grad,
        weight=on and weight.requires_grad,
        bias=on and bias is not None and bias.requires_grad,
    )

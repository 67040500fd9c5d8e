"""Inputs, float64 references, and every way to compute the loss: ours, the bare products, the plain one, and the peers' own code.

Each variant is a function of the inputs that returns a step; a step computes the loss and leaves the gradients in `.grad`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.cases import Variant, Workload
from opd.losses import full_divergence, gather_logp, partial_divergence, to_logp
from opd.losses.divergences import Divergence

LOGIT_SCALE = 4.0  # standard deviation of the student's logits: 2.4 nats of entropy at V = 32,000
NOISE = 0.1  # of the teacher's hidden states and head, relative to the student's: KL of about 0.16 nats
BETA = 0.5
TRL_BETA = {"forward_kl": 0.0, "generalized_jsd": BETA, "reverse_kl": 1.0}  # also Liger's
REFERENCE_ROWS = 64

Step = Callable[[], Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Leaves with gradients on the student's side; the teacher is hidden states and head, or its top k."""

    student_hidden: Tensor
    student_weight: Tensor
    token_weights: Tensor
    teacher_hidden: Tensor | None = None
    teacher_weight: Tensor | None = None
    top_ids: Tensor | None = None
    top_logp: Tensor | None = None

    def clear(self) -> None:
        self.student_hidden.grad = self.student_weight.grad = None


def make_inputs(
    load: Workload, *, noise: float = NOISE, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Inputs:
    """Gaussian hidden states and heads; the teacher is the student with noise, in the columns they share and in its further ones."""
    generator = torch.Generator(device).manual_seed(0)

    def gaussian(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(scale)

    per_column = LOGIT_SCALE / load.hidden**0.5
    hidden = gaussian(load.tokens, load.hidden)
    weight = gaussian(load.vocab, load.hidden, scale=per_column)
    teacher_hidden = gaussian(load.tokens, load.teacher_hidden)
    teacher_hidden[:, : load.hidden].mul_(noise).add_(hidden)
    teacher_weight = gaussian(load.vocab, load.teacher_hidden, scale=noise * LOGIT_SCALE / load.teacher_hidden**0.5)
    teacher_weight[:, : load.hidden].add_(weight)
    hidden, weight, teacher_hidden, teacher_weight = (
        x.to(dtype) for x in (hidden, weight, teacher_hidden, teacher_weight)
    )
    token_weights = torch.full((load.tokens,), 1.0 / load.tokens, device=device)
    student = {"student_hidden": hidden.requires_grad_(), "student_weight": weight.requires_grad_()}
    if load.top_k is None:
        return Inputs(
            **student, token_weights=token_weights, teacher_hidden=teacher_hidden, teacher_weight=teacher_weight
        )
    pieces = [
        to_logp(rows @ teacher_weight.T).topk(load.top_k, dim=-1) for rows in teacher_hidden.split(REFERENCE_ROWS)
    ]
    logp, ids = (torch.cat([piece[i] for piece in pieces]) for i in range(2))
    return Inputs(**student, token_weights=token_weights, top_ids=ids, top_logp=logp)


def plain_loss(name: str, inputs: Inputs) -> Tensor:
    """Σ wₙ Dₙ from whole matrices of logits, by opd.losses; `forward_kl_on_k` is verl's Σ_K q log(q / p), without a tail."""
    student_logp = to_logp(F.linear(inputs.student_hidden, inputs.student_weight))
    if inputs.top_ids is not None and inputs.top_logp is not None:
        on_k = gather_logp(student_logp, inputs.top_ids)
        if name == "forward_kl_on_k":
            per_token = (inputs.top_logp.exp() * (inputs.top_logp - on_k)).sum(dim=-1)
        else:
            per_token = partial_divergence(_divergence(name), on_k, inputs.top_logp, tail="bucket")
    else:
        assert inputs.teacher_hidden is not None and inputs.teacher_weight is not None
        teacher_logp = to_logp(F.linear(inputs.teacher_hidden, inputs.teacher_weight))
        per_token = full_divergence(_divergence(name), student_logp, teacher_logp, beta=BETA, normalize=False)
    return (per_token * inputs.token_weights).sum()


def _divergence(name: str) -> Divergence:
    assert name in TRL_BETA
    return name  # pyright: ignore[reportReturnType]


def float64_gradients(name: str, inputs: Inputs) -> dict[str, Tensor]:
    """Loss and gradients of `plain_loss` in float64, a few rows at a time."""

    def wide(x: Tensor | None, rows: slice | None = None) -> Tensor | None:
        if x is None:
            return None
        x = x.detach() if rows is None else x.detach()[rows]
        return x.double() if x.is_floating_point() else x

    weight = inputs.student_weight.detach().double().requires_grad_()
    teacher_weight = wide(inputs.teacher_weight)
    loss, hidden_grads = weight.new_zeros(()), []
    for start in range(0, len(inputs.token_weights), REFERENCE_ROWS):
        rows = slice(start, start + REFERENCE_ROWS)
        hidden = inputs.student_hidden.detach()[rows].double().requires_grad_()
        part = Inputs(
            student_hidden=hidden,
            student_weight=weight,
            token_weights=inputs.token_weights[rows].double(),
            teacher_hidden=wide(inputs.teacher_hidden, rows),
            teacher_weight=teacher_weight,
            top_ids=wide(inputs.top_ids, rows),
            top_logp=wide(inputs.top_logp, rows),
        )
        part_loss = plain_loss(name, part)
        part_loss.backward()
        loss += part_loss.detach()
        assert hidden.grad is not None
        hidden_grads.append(hidden.grad)
    assert weight.grad is not None
    return {"loss": loss, "hidden": torch.cat(hidden_grads), "weight": weight.grad}


def make_step(inputs: Inputs, variant: Variant, load: Workload) -> Step:
    """The variant's step on these inputs."""
    return BUILDERS[variant.name](inputs, variant, load)


def _products(inputs: Inputs, variant: Variant, load: Workload) -> Step:
    """The matrix products of forward and backward and nothing else, in buffers that all chunks share."""
    assert variant.chunk is not None
    chunk = variant.chunk
    hidden, weight = inputs.student_hidden.detach(), inputs.student_weight.detach()

    def step() -> None:
        rows, vocab = hidden.shape[0], weight.shape[0]
        logits = torch.empty(chunk, vocab)
        teacher_logits = None if inputs.teacher_hidden is None else torch.empty(chunk, vocab)
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.empty_like(weight)
        for start in range(0, rows, chunk):
            part = hidden[start : start + chunk]
            z = logits[: len(part)]
            torch.mm(part, weight.T, out=z)
            if teacher_logits is not None and inputs.teacher_hidden is not None and inputs.teacher_weight is not None:
                teacher_part = inputs.teacher_hidden[start : start + chunk]
                torch.mm(teacher_part, inputs.teacher_weight.T, out=teacher_logits[: len(part)])
            torch.mm(z, weight, out=hidden_grad[start : start + chunk])
            if start == 0:
                torch.mm(z.T, part, out=weight_grad)
            else:
                weight_grad.addmm_(z.T, part)

    return step


def _ours(inputs: Inputs, variant: Variant, load: Workload) -> Step:
    from opd.kernels import Impl, linear_divergence
    from opd.types import Head, HiddenTarget, TopKTarget

    if inputs.top_ids is not None and inputs.top_logp is not None:
        target = TopKTarget(ids=inputs.top_ids, teacher_logp=inputs.top_logp)
        options: dict[str, Any] = {"tail": "bucket"}
    else:
        assert inputs.teacher_hidden is not None and inputs.teacher_weight is not None
        target = HiddenTarget(hidden=inputs.teacher_hidden, head=Head(weight=inputs.teacher_weight))
        options = {"beta": BETA, "normalize": False} if variant.divergence == "generalized_jsd" else {}

    impls: dict[str, Impl] = {"ours minimal": "auto", "ours triton": "triton"}
    impl = impls.get(variant.name, "chunked")

    def step() -> Tensor:
        out = linear_divergence(
            inputs.student_hidden,
            inputs.student_weight,
            target,
            divergence=_divergence(variant.divergence),
            token_weights=inputs.token_weights,
            impl=impl,
            chunk_tokens=variant.chunk,
            memory="minimal" if impl == "auto" else "fast",
            **options,
        )
        out.loss.backward()
        return out.loss.detach()

    return step


def _naive(inputs: Inputs, variant: Variant, load: Workload) -> Step:
    def step() -> Tensor:
        loss = plain_loss(variant.divergence, inputs)
        loss.backward()
        return loss.detach()

    return step


def _trl_gkd(inputs: Inputs, variant: Variant, load: Workload) -> Step:
    """As GKDTrainer.compute_loss calls it, less the labels: selecting the unmasked rows would copy another [N, V]."""
    from trl.experimental.gkd import GKDTrainer  # pyright: ignore[reportMissingImports]

    tokens = len(inputs.token_weights)

    def loss() -> Tensor:
        assert inputs.teacher_hidden is not None and inputs.teacher_weight is not None
        student_logits = F.linear(inputs.student_hidden, inputs.student_weight).unsqueeze(0)
        with torch.no_grad():
            teacher_logits = F.linear(inputs.teacher_hidden, inputs.teacher_weight).unsqueeze(0)
        return GKDTrainer.generalized_jsd_loss(
            student_logits, teacher_logits, beta=TRL_BETA[variant.divergence], num_items_in_batch=tokens
        )

    def step() -> Tensor:
        value = loss()
        value.backward()
        return value.detach()

    return step


def _trl_chunked(inputs: Inputs, variant: Variant, load: Workload) -> Step:
    """The loss that DistillationTrainer calls; on a CPU it takes the torch path. Its tile sizes are constants of the module."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # pyright: ignore[reportMissingImports]

    tokens, beta = len(inputs.token_weights), TRL_BETA[variant.divergence]

    def step() -> Tensor:
        per_token, _ = ChunkedDivergenceFunction.apply(
            inputs.student_hidden,
            inputs.student_weight,
            None,
            inputs.teacher_hidden,
            inputs.teacher_weight,
            None,
            beta,
        )
        loss = per_token.sum() / tokens
        loss.backward()
        return loss.detach()

    return step


def _liger(inputs: Inputs, variant: Variant, load: Workload) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]

    chunk = {} if variant.chunk is None else {"chunk_size": variant.chunk}
    function = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=TRL_BETA[variant.divergence],
        compiled=variant.compiles,
        **chunk,
    )
    labels = torch.zeros_like(inputs.token_weights, dtype=torch.long)  # every token counts

    def step() -> Tensor:
        loss = function(
            inputs.student_hidden, inputs.student_weight, inputs.teacher_hidden, inputs.teacher_weight, labels
        )
        loss.backward()
        return loss.detach()

    return step


def _verl_top_k(inputs: Inputs, variant: Variant, load: Workload) -> Step:
    """verl's FSDP loss at its defaults, less the clamp of log-probabilities at −10, which would make it another loss."""
    from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk  # pyright: ignore[reportMissingImports]
    from verl.workers.config import DistillationConfig, DistillationLossConfig  # pyright: ignore[reportMissingImports]

    options = {} if variant.chunk is None else {"chunked_topk_chunk_size": variant.chunk}
    loss_config = DistillationLossConfig(
        loss_mode="forward_kl_topk",
        topk=load.top_k,
        log_prob_min_clamp=None,
        use_policy_gradient=False,
        use_chunked_topk=variant.name == "verl top-k chunked",
        **options,
    )
    config = DistillationConfig(distillation_loss=loss_config)
    assert inputs.top_ids is not None and inputs.top_logp is not None
    logp, ids = (
        torch.nested.as_nested_tensor([x], layout=torch.jagged) for x in (inputs.top_logp, inputs.top_ids)
    )  # one packed sequence

    def loss() -> Tensor:
        logits = F.linear(inputs.student_hidden, inputs.student_weight).unsqueeze(0)
        per_token = compute_forward_kl_topk(logits, logp, ids, config, "thd")["distillation_losses"]
        return (per_token.squeeze(0) * inputs.token_weights).sum()

    def step() -> Tensor:
        value = loss()
        value.backward()
        return value.detach()

    return step


BUILDERS: dict[str, Callable[[Inputs, Variant, Workload], Step]] = {
    "products": _products,
    "ours": _ours,
    "ours minimal": _ours,
    "ours triton": _ours,
    "naive": _naive,
    "TRL GKD": _trl_gkd,
    "TRL chunked": _trl_chunked,
    "Liger eager": _liger,
    "Liger compiled": _liger,
    "verl top-k": _verl_top_k,
    "verl top-k chunked": _verl_top_k,
}

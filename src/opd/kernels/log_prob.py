"""Differentiable log-probs and entropies of given tokens from hidden states, for any policy loss.

The logits are computed again in the backward pass, so that no more than a chunk of them ever exists.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opd.errors import ObjectiveError
from opd.kernels.checks import check_finite, check_ids, check_shapes
from opd.kernels.chunk_loop import HeadLogits, exact_float32, lift
from opd.kernels.spec import MASKED, GradsNeeded, HeadSpec, head_spec, pieces, restore_neg_inf, unshard
from opd.losses import Objective
from opd.losses._shapes import Float, Int

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_log_prob(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    token_ids: Int[Tensor, " tokens"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    chunk_tokens: int | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """log p(token) and the entropy of p = softmax((hidden @ weight.T + bias) / temperature), in nats, both differentiable.

    One product forward and three backward (two where the weight or the hidden states are frozen); memory is that of one
    chunk of logits. In the backward pass, tokens without an incoming gradient cost nothing. Computed in float32
    (float64 for float64 inputs) whatever the dtype of the operands. `group` as in `linear_divergence`.

    Raises ObjectiveError for shapes, dtypes, devices and ids that do not fit, NonFiniteError for NaN or infinite inputs.
    """
    weight, bias = unshard(weight), None if bias is None else unshard(bias)
    check_shapes(hidden, weight, bias, None, None, token_ids, None, None)
    head = head_spec(
        hidden,
        weight,
        bias,
        valid_vocab=valid_vocab,
        temperature=Objective(student_temperature=temperature).student_temperature,  # refuses what is none
        chunk_tokens=chunk_tokens,
        group=group,
    )
    check_ids("response_ids", token_ids, head.columns.vocab)
    check_finite(head.hidden, head.weight, head.bias, head.token_weights)
    log_prob, entropy, _, _ = _LogProb.apply(hidden, weight, bias, token_ids, head)  # pyright: ignore[reportGeneralTypeIssues]
    return log_prob, entropy


class _LogProb(torch.autograd.Function):
    """Log-probs and entropies; and log Σ e^z and the entropies again, for the backward pass alone."""

    @staticmethod
    def forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, head: HeadSpec) -> tuple[Tensor, ...]:
        with torch.autocast(hidden.device.type, enabled=False), exact_float32(hidden.device):
            log_z, log_prob, entropy = _statistics(head, ids)
        return log_prob, entropy.clone(), log_z, entropy

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, bias, ids, head = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(hidden, weight, bias, ids, *output[2:])
        nothing = torch.empty(0, dtype=head.hidden.dtype, device=head.hidden.device)
        ctx.head = replace(head, hidden=nothing, weight=nothing, bias=None)  # autograd holds these

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        found = _Gradients.apply(*ctx.saved_tensors, grad_logp, grad_entropy, ctx.head)
        assert isinstance(found, tuple)
        return (*found, None, None)


class _Gradients(torch.autograd.Function):
    """The backward pass: a function of its own, so that torch.func shows it plain tensors."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        log_z: Tensor,
        entropy: Tensor,
        grad_logp: Tensor | None,
        grad_entropy: Tensor | None,
        head: HeadSpec,
    ) -> tuple[Tensor | None, ...]:
        head = replace(head, hidden=hidden, weight=weight, bias=bias)
        zeros = torch.zeros_like(entropy)
        grad_logp = zeros if grad_logp is None else grad_logp
        grad_entropy = zeros if grad_entropy is None else grad_entropy
        rows = ((grad_logp != 0) | (grad_entropy != 0)).nonzero().squeeze(-1)
        everything = len(rows) == len(hidden)
        if not everything:
            head, ids = head.at(rows), ids[rows]
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False), exact_float32(hidden.device):
            slopes = [part[rows].to(head.dtype) for part in (grad_logp, grad_entropy)]
            up = lift(head, *slopes)
            found = _gradients(head, ids, slopes[0] * up, slopes[1] * up, log_z[rows], entropy[rows])
            own = [
                None if value is None or like is None else (value / up if up != 1.0 else value).to(like.dtype)
                for value, like in zip(found, (hidden, weight, bias), strict=True)
            ]
        if own[0] is not None and not everything:
            own[0] = torch.zeros_like(hidden).index_copy(0, rows, own[0])
        return tuple(own)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise ObjectiveError("linear_log_prob has first derivatives only; use whole logits and opd.losses for more.")


def _row_kernels(head: HeadSpec) -> Any:
    """Triton's, as a module, where they run and have whole rows; else None."""
    if not (head.hidden.is_cuda and head.columns.shards.alone and importlib.util.find_spec("triton") is not None):
        return None
    from opd.kernels.rows import triton

    return triton


def _student(head: HeadSpec) -> HeadLogits:
    student = HeadLogits(head)
    if student.layer.bias is not None:
        student.layer.bias = student.layer.bias.clamp_min(MASKED)  # times a probability of 0 it is 0, where −inf is not
    return student


def _statistics(head: HeadSpec, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log Σ e^z, log p(token) and the entropy of every row."""
    shards, student = head.columns.shards, _student(replace(head, needs=GradsNeeded()))
    buffer, kernels = student.buffer(), _row_kernels(head)
    parts: list[tuple[Tensor, ...]] = [(buffer.new_empty(0),) * 3]
    for index in student.chunks():
        z = student.logits(index, buffer[: index.stop - index.start], MASKED)
        if kernels is not None:
            parts.append(kernels.log_prob_of_rows(z, ids[index]))
            continue
        y_logit = shards.pick(z, ids[index].unsqueeze(-1))
        top = shards.top(z, MASKED)
        z.sub_(top)
        sums = [(p.sum(-1, keepdim=True), (p * z[some]).sum(-1, keepdim=True)) for some in pieces(z) for p in [z[some].exp()]]  # fmt: skip
        mass, mean = shards.sum(*(torch.cat(column) for column in zip(*sums, strict=True)))
        log_mass = mass.log()
        found = top + log_mass, y_logit - top - log_mass, log_mass - mean / mass
        parts.append(tuple(part.squeeze(-1) for part in found))
    log_z, log_prob, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
    return log_z, restore_neg_inf(log_prob), entropy


def _gradients(
    head: HeadSpec, ids: Tensor, d_logp: Tensor, d_entropy: Tensor, log_z: Tensor, entropy: Tensor
) -> tuple[Tensor | None, ...]:
    """d_logp (1[v = y] − p) − d_entropy p (log p + H), through the products."""
    student = _student(head)
    buffer, kernels = student.buffer(), _row_kernels(head)
    for index in student.chunks():
        z = student.logits(index, buffer[: index.stop - index.start], MASKED)
        if kernels is not None:
            room = student.gradient_room(index, lambda: None)
            out = z if room is None else room
            kernels.log_prob_gradient(z, out, *(part[index] for part in (ids, d_logp, d_entropy, log_z, entropy)))
            student.add_gradient(out, torch.ones_like(d_logp[index]), index)
            continue
        for some in pieces(z):
            here, there = z[some], slice(index.start + some.start, index.start + some.stop)
            here.sub_(log_z[there].unsqueeze(-1))
            p = here.exp()
            slope = d_entropy[there].unsqueeze(-1)
            if bool(slope.any()):
                here.add_(entropy[there].unsqueeze(-1)).mul_(-slope).sub_(d_logp[there].unsqueeze(-1)).mul_(p)
            else:
                torch.mul(p, -d_logp[there].unsqueeze(-1), out=here)
        head.columns.shards.add_at(z, ids[index].unsqueeze(-1), d_logp[index].unsqueeze(-1))
        student.add_gradient(z, torch.ones_like(d_logp[index]), index)
    return student.gradients()

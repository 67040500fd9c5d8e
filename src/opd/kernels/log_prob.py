"""Differentiable log-probs and entropies of given tokens from hidden states, for any policy loss: the logits are computed
again in the backward pass, so that no more than a chunk of them ever exists.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opd.errors import ObjectiveError
from opd.kernels.api import default_chunk, gathered, wanted
from opd.kernels.checks import check_finite, check_request, check_shapes, common_vocabulary
from opd.kernels.fused import lift
from opd.kernels.parallel import Shards
from opd.kernels.products import Head, exact_float32
from opd.kernels.request import MASKED, Request
from opd.kernels.walk import Gradients, chunk_of, masked_columns, student_head
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
    weight, bias = gathered(weight), None if bias is None else gathered(bias)
    ones = torch.ones(hidden.shape[:1], device=hidden.device)
    check_shapes(hidden, weight, bias, None, ones, token_ids, None, None)
    shards = Shards(weight.shape[0], group)
    request = Request(
        hidden=hidden.detach(),
        weight=weight.detach(),
        bias=None if bias is None else bias.detach(),
        target=None,
        objective=Objective(student_temperature=temperature),
        token_weights=ones,
        response_ids=token_ids,
        entropy_bonus=1.0,
        vocab=common_vocabulary(shards, None, valid_vocab),
        needs=wanted(hidden, weight, bias),
        shards=shards,
        chunk_tokens=chunk_tokens if chunk_tokens is not None else default_chunk(hidden, shards.size, "fast"),
    )
    check_request(request, "chunked")
    check_finite(request)
    log_prob, entropy, _, _ = _LogProb.apply(hidden, weight, bias, request)  # pyright: ignore[reportGeneralTypeIssues]
    return log_prob, entropy


class _LogProb(torch.autograd.Function):
    """Log-probs and entropies; and log Σ e^z and the entropies again, for the backward pass alone."""

    @staticmethod
    def forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, request: Request) -> tuple[Tensor, ...]:
        request = _filled(
            request, hidden, weight, bias
        )  # torch.func shows this function other tensors than its caller holds
        with torch.autocast(hidden.device.type, enabled=False), exact_float32(hidden.device):
            log_z, log_prob, entropy = _statistics(request)
        return log_prob, entropy.clone(), log_z, entropy

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, bias, request = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(hidden, weight, bias, *output[2:])
        nothing = torch.empty(0, dtype=request.hidden.dtype, device=request.hidden.device)
        ctx.request = replace(request, hidden=nothing, weight=nothing, bias=None)  # tensors are held by autograd

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        found = _Gradients.apply(*ctx.saved_tensors, grad_logp, grad_entropy, ctx.request)
        assert isinstance(found, tuple)
        return (*found, None)


class _Gradients(torch.autograd.Function):
    """The backward pass: a function of its own, so that torch.func shows it plain tensors."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        log_z: Tensor,
        entropy: Tensor,
        grad_logp: Tensor | None,
        grad_entropy: Tensor | None,
        request: Request,
    ) -> tuple[Tensor | None, ...]:
        request = _filled(request, hidden, weight, bias)
        zeros = torch.zeros_like(entropy)
        grad_logp = zeros if grad_logp is None else grad_logp
        grad_entropy = zeros if grad_entropy is None else grad_entropy
        rows = ((grad_logp != 0) | (grad_entropy != 0)).nonzero().squeeze(-1)
        everything = len(rows) == len(hidden)
        if not everything:
            request = replace(
                request,
                hidden=request.hidden[rows],
                token_weights=request.token_weights[rows],
                response_ids=_ids(request)[rows],
            )
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False), exact_float32(hidden.device):
            slopes = [part[rows].to(request.dtype) for part in (grad_logp, grad_entropy)]
            up = lift(request, *slopes)
            answer = _gradients(request, slopes[0] * up, slopes[1] * up, log_z[rows], entropy[rows]).answer({})
            found = answer.hidden_grad, answer.weight_grad, answer.bias_grad
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


def _filled(request: Request, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Request:
    bias = None if bias is None else bias.detach()
    return replace(request, hidden=hidden.detach(), weight=weight.detach(), bias=bias)


def _ids(request: Request) -> Tensor:
    if request.response_ids is None:
        raise ObjectiveError("log-probs are of tokens; pass token_ids.")
    return request.response_ids


def _head(request: Request) -> Head:
    head = student_head(request, masked_columns(request))
    if head.bias is not None:
        head.bias = head.bias.clamp_min(MASKED)  # times a probability of 0 it is 0, where −inf is not
    return head


def _statistics(request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """log Σ e^z, log p(token) and the entropy of every row."""
    shards, ids = request.shards, _ids(request)
    head, chunk = _head(request), chunk_of(request)
    buffer = torch.empty(chunk, head.columns, dtype=request.dtype, device=request.hidden.device)
    parts: list[tuple[Tensor, ...]] = [(buffer.new_empty(0),) * 3]
    for first in range(0, request.tokens, chunk):
        hidden = request.hidden[first : first + chunk]
        z = head.logits(hidden, buffer[: len(hidden)], MASKED)
        y_logit = shards.pick(z, ids[first : first + chunk].unsqueeze(-1))
        (top,) = shards.max(z.amax(-1, keepdim=True) if head.columns else z.new_full((len(z), 1), MASKED))
        z.sub_(top)
        pieces = [(p.sum(-1, keepdim=True), (p * rows).sum(-1, keepdim=True)) for rows in z.split(_piece(z)) for p in [rows.exp()]]  # fmt: skip
        mass, mean = shards.sum(*(torch.cat(column) for column in zip(*pieces, strict=True)))
        log_mass = mass.log()
        found = top + log_mass, y_logit - top - log_mass, log_mass - mean / mass
        parts.append(tuple(part.squeeze(-1) for part in found))
    log_z, log_prob, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
    return log_z, torch.where(log_prob < MASKED / 2, -torch.inf, log_prob), entropy


def _piece(z: Tensor) -> int:
    return max(1, (1 << (24 if z.is_cuda else 16)) // max(1, z.shape[1]))


def _gradients(request: Request, d_logp: Tensor, d_entropy: Tensor, log_z: Tensor, entropy: Tensor) -> Gradients:
    """d_logp (1[v = y] − p) − d_entropy p (log p + H), through the products."""
    head, chunk = _head(request), chunk_of(request)
    gradients = Gradients(request, head)
    buffer = torch.empty(chunk, head.columns, dtype=request.dtype, device=request.hidden.device)
    ids = _ids(request)
    for first in range(0, request.tokens, chunk):
        rows = slice(first, min(first + chunk, request.tokens))
        z = head.logits(request.hidden[rows], buffer[: rows.stop - rows.start], MASKED)
        size = _piece(z)
        for a in range(0, len(z), size):
            here, there = z[a : a + size], slice(first + a, min(first + a + size, rows.stop))
            here.sub_(log_z[there].unsqueeze(-1))
            p = here.exp()
            slope = d_entropy[there].unsqueeze(-1)
            if bool(slope.any()):
                here.add_(entropy[there].unsqueeze(-1)).mul_(-slope).sub_(d_logp[there].unsqueeze(-1)).mul_(p)
            else:
                torch.mul(p, -d_logp[there].unsqueeze(-1), out=here)
        request.shards.add_at(z, ids[rows].unsqueeze(-1), d_logp[rows].unsqueeze(-1))
        gradients.add(z, torch.ones_like(d_logp[rows]), rows)
    return gradients

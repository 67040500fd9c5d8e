"""Per-token diagnostics without gradient: the distance of student and teacher, whatever the loss."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from opd.losses._shapes import Float, Int
from opd.losses.divergences import entropy, full_divergence, to_logp
from opd.losses.partial import gather_logp, likeliest, overlap, partial_divergence, support_of, top_overlap
from opd.types import DenseTarget, SampledTarget, TopKTarget

CPU_PIECE = 1 << 16  # vocabulary entries of float32 that fit a core's cache
GPU_PIECE = 1 << 26  # 256 MiB of float32


def student_diagnostics(
    student_logp: Float[Tensor, "tokens vocab"], response_ids: Int[Tensor, " tokens"]
) -> dict[str, Float[Tensor, " tokens"]]:
    """`student_entropy` (nats) and `student_logp` of the response token."""
    return {"student_entropy": entropy(student_logp), "student_logp": gather_logp(student_logp, response_ids)}


def dense_diagnostics(
    student_logp: Float[Tensor, "tokens vocab"],
    teacher_logp: Float[Tensor, "tokens vocab"],
    response_ids: Int[Tensor, " tokens"],
    top_k: int | None = None,
) -> dict[str, Float[Tensor, " tokens"]]:
    """Both KLs, both entropies and log-probs of the response token, and the overlap of the likeliest tokens."""
    return {
        **_kls_and_entropies(student_logp, teacher_logp),
        "student_logp": gather_logp(student_logp, response_ids),
        "teacher_logp": gather_logp(teacher_logp, response_ids),
        "overlap": top_overlap(student_logp, teacher_logp, top_k),
    }


def _kls_and_entropies(
    student_logp: Float[Tensor, "tokens vocab"], teacher_logp: Float[Tensor, "tokens vocab"]
) -> dict[str, Float[Tensor, " tokens"]]:
    """Four numbers from one difference and two exponentials where nothing is −inf; elsewhere the losses' own functions."""
    difference = student_logp - teacher_logp
    if not difference.sum().isfinite():
        return {
            "reverse_kl": full_divergence("reverse_kl", student_logp, teacher_logp),
            "forward_kl": full_divergence("forward_kl", student_logp, teacher_logp),
            "student_entropy": entropy(student_logp),
            "teacher_entropy": entropy(teacher_logp),
        }
    student_logp, teacher_logp = student_logp.to(difference.dtype), teacher_logp.to(difference.dtype)
    p, q = student_logp.exp(), teacher_logp.exp()
    dot = cast(Any, torch.linalg).vecdot  # torch gives it no type
    return {
        "reverse_kl": dot(p, difference),
        "forward_kl": -dot(q, difference),
        "student_entropy": -dot(p, student_logp),
        "teacher_entropy": -dot(q, teacher_logp),
    }


def top_k_diagnostics(
    student_logp: Float[Tensor, "tokens vocab"], ids: Int[Tensor, "tokens k"], teacher_logp: Float[Tensor, "tokens k"]
) -> dict[str, Float[Tensor, " tokens"]]:
    """Both KLs in their `bucket` form, a lower bound of the exact ones, the overlap of the likeliest tokens, and what each model gives
    the support as a whole."""
    support = support_of(ids)
    student_on_k, teacher_on_k = support.gather(student_logp), support.mask(teacher_logp)
    k = min(ids.shape[-1], student_logp.shape[-1])
    return {
        "reverse_kl": partial_divergence("reverse_kl", student_on_k, teacher_on_k),
        "forward_kl": partial_divergence("forward_kl", student_on_k, teacher_on_k),
        "overlap": overlap(likeliest(student_logp, k)[1], ids),
        "support_mass": student_on_k.exp().sum(-1),
        "teacher_support_mass": teacher_on_k.exp().sum(-1),
    }


@torch.no_grad()
def token_diagnostics(
    student_logp: Float[Tensor, "tokens vocab"],
    target: DenseTarget | TopKTarget | SampledTarget,
    response_ids: Int[Tensor, " tokens"],
    top_k: int | None = None,
) -> dict[str, Float[Tensor, " tokens"]]:
    """Every diagnostic that this kind of target allows; `top_k` bounds the tokens that `overlap` compares."""
    metrics = student_diagnostics(student_logp, response_ids) if not isinstance(target, DenseTarget) else {}
    if isinstance(target, DenseTarget):
        metrics |= _in_pieces(student_logp, target.logits, response_ids, top_k)
    elif isinstance(target, TopKTarget):
        metrics |= top_k_diagnostics(student_logp, target.ids, target.teacher_logp)
        if target.sampled_logp is not None:
            metrics["teacher_logp"] = target.sampled_logp
    else:
        metrics["teacher_logp"] = target.teacher_logp
    return metrics


def _in_pieces(
    student_logp: Tensor, teacher_logits: Tensor, response_ids: Tensor, top_k: int | None
) -> dict[str, Float[Tensor, " tokens"]]:
    """Diagnostics of a few rows at a time: on a CPU a piece stays in cache, on a GPU it bounds the temporaries."""
    entries = CPU_PIECE if student_logp.device.type == "cpu" else GPU_PIECE
    rows = max(1, entries // student_logp.shape[-1])
    parts = [slice(start, start + rows) for start in range(0, max(1, len(response_ids)), rows)]
    pieces = [dense_diagnostics(student_logp[p], to_logp(teacher_logits[p]), response_ids[p], top_k) for p in parts]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}

"""Some of the vocabulary's entries: the likeliest, a support K of them, and divergences on K with a named rule for the mass outside.

Log-probabilities on K are normalised over the *whole* vocabulary. A repeated token is marked in `Support.counted` and has
log-probability −inf on both sides, so that it counts once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from opd.errors import ObjectiveError
from opd.losses._shapes import Bool, Float, Int
from opd.losses.choices import Divergence, Tail
from opd.losses.divergences import entry_terms, mass_coefficient

GROUP = 32  # of 16, 32, 64 and 128 the fastest for 16 or 64 of 32 000 or 151 936 entries (benchmarks/LOG.md)
OVERLAP_K = 16  # arXiv 2604.13016 watches the agreement of the 16 likeliest tokens


@dataclass(frozen=True, kw_only=True)
class Support:
    """The tokens of K at each position."""

    ids: Int[Tensor, "tokens k"]
    counted: Bool[Tensor, "tokens k"]
    """False where the same token stands earlier in the row's order of ids."""

    def contains(self, token_ids: Int[Tensor, " tokens"]) -> Bool[Tensor, " tokens"]:
        """True where a position's token is in its support."""
        return (self.ids == token_ids.unsqueeze(-1)).any(dim=-1)

    def gather(self, logp: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "tokens k"]:
        """Log-probabilities on K, −inf where a token is a repetition."""
        return self.mask(gather_logp(logp, self.ids))

    def mask(self, logp_on_k: Float[Tensor, "tokens k"]) -> Float[Tensor, "tokens k"]:
        """−inf where a token is a repetition."""
        return torch.where(self.counted, logp_on_k, -torch.inf)


@dataclass(frozen=True, kw_only=True)
class SampledToken:
    """The response token at each position, which tail='sampled' uses to see outside K."""

    student_logp: Float[Tensor, " tokens"]
    teacher_logp: Float[Tensor, " tokens"]
    in_support: Bool[Tensor, " tokens"]
    sampler_logp: Float[Tensor, " tokens"] | None = None
    """Log-probability under the distribution it was drawn from; None means the student itself."""


def gather_logp(
    logp: Float[Tensor, "tokens vocab"], ids: Int[Tensor, "tokens k"] | Int[Tensor, " tokens"]
) -> Float[Tensor, "tokens k"] | Float[Tensor, " tokens"]:
    """Log-probabilities of the given tokens: one per position, or k per position."""
    if ids.dim() == logp.dim():
        return logp.gather(-1, ids)
    return logp.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def support_of(ids: Int[Tensor, "tokens k"]) -> Support:
    """A support from token ids in which repetitions are allowed."""
    in_order, position = ids.sort(dim=-1, stable=True)
    first = torch.ones_like(in_order, dtype=torch.bool)
    first[..., 1:] = in_order[..., 1:] != in_order[..., :-1]
    return Support(ids=ids, counted=torch.empty_like(first).scatter(-1, position, first))


def top_k_support(logp: Float[Tensor, "tokens vocab"], k: int, always_include: Sequence[int] = ()) -> Support:
    """The k likeliest tokens of each position (all of them when k exceeds the vocabulary), and `always_include`."""
    return support_of(_top_ids(logp, k, always_include))


def union_support(
    student_logp: Float[Tensor, "tokens vocab"],
    teacher_logp: Float[Tensor, "tokens vocab"],
    k: int,
    always_include: Sequence[int] = (),
) -> Support:
    """The k likeliest tokens of the student and of the teacher, and `always_include`."""
    return support_of(torch.cat([_top_ids(student_logp, k), _top_ids(teacher_logp, k, always_include)], dim=-1))


def partial_divergence(
    name: Divergence,
    student_logp: Float[Tensor, "tokens k"],
    teacher_logp: Float[Tensor, "tokens k"],
    *,
    tail: Tail = "bucket",
    alpha: float = 0.5,
    beta: float = 0.5,
    normalize: bool = True,
    sampled: SampledToken | None = None,
    floored_logp: Float[Tensor, "tokens k"] | None = None,
) -> Float[Tensor, " tokens"]:
    """The divergence called `name` on a support K, with d(p, q) its entry term and c its `mass_coefficient`.

    bucket: Σ_K d + d(1−Σ_K p, 1−Σ_K q), a true divergence of the coarsened distributions, never above the exact one.
    generalized: Σ_K [d + c (q−p)], ≥ 0 entry by entry, blind outside K.
    renormalize: Σ_K d of the two distributions renormalised on K, free of any constraint outside K.
    sampled: generalized + 1[y∉K] [d + c (q−p)](y) / sg[μ(y)], unbiased in value and gradient for y ~ μ.

    `floored_logp` are the teacher's log-probs raised to a floor: they stand for q in the terms of K, not in the mass outside.
    """
    if tail not in get_args(Tail):
        raise ObjectiveError(f"tail={tail!r} is not one of {', '.join(get_args(Tail))}.")
    coefficient = mass_coefficient(name, beta, alpha)

    def terms(logp: Tensor, logq: Tensor) -> Tensor:
        return entry_terms(name, logp, logq, alpha=alpha, beta=beta, normalize=normalize)

    def grounded(logp: Tensor, logq: Tensor) -> Tensor:
        plain = terms(logp, logq)
        return plain + coefficient * (logq.exp() - logp.exp()).to(plain.dtype) if coefficient else plain

    logp, logq = _wide(student_logp), _wide(teacher_logp if floored_logp is None else floored_logp)
    if tail == "bucket":
        rest = tail_logp(_wide(teacher_logp)).unsqueeze(-1)
        return terms(_with_tail(logp), torch.cat([logq, rest], dim=-1)).sum(dim=-1)
    if tail == "renormalize":
        if logp.shape[-1] == 1:
            raise ObjectiveError(
                "tail='renormalize' with one entry is identically 0, because one renormalised probability is 1 on both "
                "sides; use tail='bucket' or a larger top_k."
            )
        return terms(_renormalise(logp), _renormalise(logq)).sum(dim=-1)
    inside = grounded(logp, logq).sum(dim=-1)
    if tail == "generalized":
        return inside
    if sampled is None:
        raise ObjectiveError(
            "tail='sampled' needs the response token's log-probs under student and teacher; pass `sampled`."
        )
    y_logp, y_logq = _wide(sampled.student_logp), _wide(sampled.teacher_logp)
    drawn_logp = (y_logp if sampled.sampler_logp is None else _wide(sampled.sampler_logp)).detach()
    drawn_logp = torch.where(drawn_logp == -torch.inf, 0.0, drawn_logp)
    # Every d here is homogeneous, d(p, q)/μ = d(p/μ, q/μ), and the right side cannot underflow.
    outside_logp = torch.where(sampled.in_support, -torch.inf, y_logp - drawn_logp)
    outside_logq = torch.where(sampled.in_support, -torch.inf, y_logq - drawn_logp)
    return inside + grounded(outside_logp, outside_logq)


def likeliest(
    logp: Float[Tensor, "*tokens vocab"], k: int
) -> tuple[Float[Tensor, "*tokens k"], Int[Tensor, "*tokens k"]]:
    """The k largest entries of each row and their ids, largest first; among equals any.

    The k largest are in the k groups with the largest maxima, so most of a large vocabulary is read once, for maxima.
    """
    groups = logp.shape[-1] // GROUP
    if groups < 4 * k:
        whole = logp.topk(k, dim=-1)
        return whole.values, whole.indices
    # Group g is {g, g + groups, g + 2 groups, …}: its maximum is then taken entry by entry over whole rows.
    grouped = logp[..., : GROUP * groups].reshape(*logp.shape[:-1], GROUP, groups)
    chosen = grouped.amax(-2).topk(k, dim=-1, sorted=False).indices.unsqueeze(-2)
    values = grouped.gather(-1, chosen.expand(*logp.shape[:-1], GROUP, k)).flatten(-2)
    within = torch.arange(GROUP, device=logp.device).unsqueeze(-1)
    ids = (chosen + groups * within).flatten(-2)
    if GROUP * groups < logp.shape[-1]:
        rest = torch.arange(GROUP * groups, logp.shape[-1], device=logp.device)
        values = torch.cat([values, logp[..., GROUP * groups :]], dim=-1)
        ids = torch.cat([ids, rest.expand(*logp.shape[:-1], -1)], dim=-1)
    best = values.topk(k, dim=-1)
    return best.values, ids.gather(-1, best.indices)


def overlap_size(vocab: int, top_k: int | None = None) -> int:
    """Number of likeliest tokens that `top_overlap` compares: 16 or `top_k` if that is less."""
    likely = OVERLAP_K if top_k is None else min(top_k, OVERLAP_K)
    return max(1, min(likely, vocab // 4))  # of a whole small vocabulary all would agree


def top_overlap(
    student: Float[Tensor, "tokens vocab"], teacher: Float[Tensor, "tokens vocab"], top_k: int | None = None
) -> Float[Tensor, " tokens"]:
    """The share of the likeliest tokens, 16 or `top_k` if that is less, that both agree on; from log-probs or logits."""
    k = overlap_size(student.shape[-1], top_k)
    return overlap(likeliest(student, k)[1], likeliest(teacher, k)[1])


def overlap(student_ids: Int[Tensor, "tokens k"], teacher_ids: Int[Tensor, "tokens j"]) -> Float[Tensor, " tokens"]:
    """The share of the student's k likeliest tokens that are among the teacher's."""
    shared = (student_ids.unsqueeze(-1) == teacher_ids.unsqueeze(-2)).any(dim=-1)
    return shared.to(torch.float32).mean(dim=-1)


def tail_logp(logp_on_k: Float[Tensor, "tokens k"]) -> Float[Tensor, " tokens"]:
    """log(1 − Σ_K p), floored at log eps of the dtype.

    1 − Σ_K p cannot be told from 0 below eps. Without the floor a teacher whose tail rounds to 0 would make the divergence
    infinite; with it, both sides have the same, smallest tail.
    """
    mass = logp_on_k.exp().sum(dim=-1)
    tail_floor = torch.finfo(logp_on_k.dtype).eps
    resolved = 1.0 - mass > tail_floor
    return torch.where(resolved, torch.log1p(-torch.where(resolved, mass, 0.0)), math.log(tail_floor))


def _with_tail(logp: Tensor) -> Tensor:
    return torch.cat([logp, tail_logp(logp).unsqueeze(-1)], dim=-1)


def _renormalise(logp: Tensor) -> Tensor:
    empty = (logp == -torch.inf).all(dim=-1, keepdim=True)
    return torch.where(empty, -torch.inf, torch.log_softmax(torch.where(empty, 0.0, logp), dim=-1))


def _wide(logp: Tensor) -> Tensor:
    return logp if logp.dtype == torch.float64 else logp.float()


def _top_ids(logp: Tensor, k: int, always_include: Sequence[int] = ()) -> Tensor:
    if k < 1:
        raise ObjectiveError(f"top_k must be at least 1, not {k}.")
    vocab = logp.shape[-1]
    if any(not 0 <= token < vocab for token in always_include):
        raise ObjectiveError(
            f"always_include={tuple(always_include)} has ids outside the vocabulary of {vocab} tokens."
        )
    ids = likeliest(logp.detach(), min(k, vocab))[1]
    extra = torch.tensor(list(always_include), dtype=ids.dtype, device=ids.device)
    return torch.cat([ids, extra.expand(*ids.shape[:-1], -1)], dim=-1) if always_include else ids

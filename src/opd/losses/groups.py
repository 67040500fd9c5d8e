"""Tokens that mean the same end of an answer, counted as one action: their probabilities are added, in both models.

Two models may end their answers with different members of a set, and agree all the same (arXiv 2609.20511). A divergence between
the added probabilities is one of coarser distributions, never above that of the whole ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opd.losses._shapes import Float, Int

Groups = Sequence[Sequence[int]]


def merge_tokens(logits: Float[Tensor, "tokens vocab"], groups: Groups) -> Float[Tensor, "tokens vocab"]:
    """Logits in which the first member of each group has the others' probability too, and the others −inf; differentiable.

    Merging twice changes nothing.
    """
    for group in groups:
        ids = torch.tensor(tuple(group), device=logits.device)
        members = logits[:, ids]
        top = members.detach().amax(-1, keepdim=True)
        alive = top > -torch.inf
        shifted = torch.where(members > -torch.inf, members - torch.where(alive, top, 0.0), -torch.inf)
        whole = torch.where(alive, shifted.exp().sum(-1, keepdim=True), 1.0).log() + top
        parts = torch.cat([whole, torch.full_like(members[:, 1:], -torch.inf)], dim=-1)
        logits = logits.index_copy(1, ids, parts)
    return logits


def merge_tokens_(
    logits: Float[Tensor, "tokens vocab"], groups: Groups, fill: float
) -> list[Float[Tensor, "tokens k"]]:
    """`merge_tokens` in place, with `fill` for the others; the share of each member in its group, for `spread_`."""
    shares: list[Tensor] = []
    for group in groups:
        ids = torch.tensor(tuple(group), device=logits.device)
        members = logits[:, ids]
        top = members.amax(-1, keepdim=True)
        finite = torch.where(top > -torch.inf, top, 0.0)
        weights = (members - finite).exp()
        mass = weights.sum(-1, keepdim=True)
        shares.append(torch.where(mass > 0, weights / mass, 0.0))
        logits[:, ids] = fill
        logits[:, ids[0]] = torch.where(mass > 0, finite + mass.log(), top).squeeze(-1)
    return shares


def spread_(gradient: Float[Tensor, "tokens vocab"], groups: Groups, shares: Sequence[Tensor]) -> None:
    """The gradient of merged logits as that of the logits themselves, in place: d log Σ e^z / dz_i is the share of i."""
    for group, share in zip(groups, shares, strict=True):
        ids = torch.tensor(tuple(group), device=gradient.device)
        gradient[:, ids] = gradient[:, ids[:1]] * share.to(gradient.dtype)


def first_of(ids: Int[Tensor, "*tokens"], groups: Groups) -> Int[Tensor, "*tokens"]:
    """The first member in place of any member of a group."""
    for group in groups:
        member = torch.isin(ids, torch.tensor(tuple(group), device=ids.device, dtype=ids.dtype))
        ids = torch.where(member, group[0], ids)
    return ids

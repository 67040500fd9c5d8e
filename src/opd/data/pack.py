"""Rollouts and targets → micro-batches. The one shift by one lives here.

A model's output at position i predicts token i + 1. The response starts at position len(prompt), so its tokens are predicted
by positions len(prompt) − 1 … len(prompt) + len(response) − 2. The last response token predicts nothing and is not fed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch

from opd.errors import DataError, OpdError
from opd.losses import Reduction, token_weights
from opd.types import (
    AnyTarget,
    Batch,
    DenseTarget,
    HiddenTarget,
    Rollout,
    SampledTarget,
    Sequences,
    TeacherMixture,
    TopKTarget,
)

Layout = Literal["right_padded", "left_padded", "packed"]


def layout_sequences(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    layout: Layout,
    pad_id: int,
    device: torch.device | str = "cpu",
) -> Sequences:
    """Token ids laid out for one forward pass. Raises DataError for an empty prompt or response.

    `predict_index` follows the order of the responses. Padding is told apart by position, never by token id, so pad == eos is
    harmless.
    """
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if not prompt or not response:
            which = "prompt" if not prompt else "response"
            raise DataError(f"Sequence {row} has an empty {which}: there is no position that predicts its first token.")
    inputs = [[*p, *r[:-1]] for p, r in zip(prompts, responses, strict=True)]
    lengths = [len(row) for row in inputs]
    width = sum(lengths) if layout == "packed" else max(lengths)
    # flat index of each sequence's first token
    if layout == "packed":
        starts = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
    else:
        starts = [row * width + (width - n if layout == "left_padded" else 0) for row, n in enumerate(lengths)]
    total = width if layout == "packed" else width * len(inputs)
    ids = torch.full((total,), pad_id, dtype=torch.long)
    positions = torch.zeros(total, dtype=torch.long)
    mask = torch.zeros(total, dtype=torch.long)
    predict = []
    for start, row, prompt, response in zip(starts, inputs, prompts, responses, strict=True):
        ids[start : start + len(row)] = torch.tensor(row)
        positions[start : start + len(row)] = torch.arange(len(row))
        mask[start : start + len(row)] = 1
        first = start + len(prompt) - 1
        predict.append(torch.arange(first, first + len(response)))
    rows = 1 if layout == "packed" else len(inputs)
    return Sequences(
        input_ids=ids.view(rows, -1).to(device),
        attention_mask=None if layout == "packed" else mask.view(rows, -1).to(device),
        position_ids=positions.view(rows, -1).to(device),
        predict_index=torch.cat(predict).to(device),
    )


def pack(
    rollouts: Sequence[Rollout],
    targets: Sequence[AnyTarget] | None,
    *,
    layout: Layout,
    tokens_per_microbatch: int,
    pad_id: int,
    reduction: Reduction = "token_mean",
    global_count: float | None = None,
    advantages: Sequence[torch.Tensor] | None = None,
    keep: Sequence[torch.Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> list[Batch]:
    """Micro-batches of at most `tokens_per_microbatch` tokens, padding included (a longer single sequence stands alone).

    The weights divide by the count of the *whole* list, so any way of cutting it gives the same loss. `global_count` overrides
    that count: response tokens for token_mean, sequences for sequence_mean, the constant for fixed. `advantages` are one tensor per
    rollout, one number per response token; `keep` likewise says which tokens take part at all, and the others are not counted.
    """
    lengths = [len(r.prompt_ids) + len(r.response_ids) - 1 for r in rollouts]
    if global_count is None:
        global_count = count_of(rollouts, reduction, keep)
    batches = []
    for members in group_by_length(lengths, budget=tokens_per_microbatch, layout=layout):
        chosen = tuple(rollouts[i] for i in members)
        target = concatenate([targets[i] for i in members], device) if targets is not None else None
        batch = _batch(chosen, layout, pad_id, device)
        if advantages is not None:
            batch = dataclasses.replace(batch, advantages=torch.cat([advantages[i] for i in members]).to(device))
        if keep is not None:
            batch = keep_tokens(batch, torch.cat([keep[i] for i in members]).to(device))
        sizes = torch.bincount(batch.sequence_index, minlength=len(chosen))
        weights = token_weights(batch.sequence_index, sizes, reduction=reduction, global_count=global_count)
        batches.append(with_target(dataclasses.replace(batch, token_weights=weights), target))
    return batches


def count_of(rollouts: Sequence[Rollout], reduction: Reduction, keep: Sequence[torch.Tensor] | None = None) -> int:
    """What these rollouts' losses are divided by: sequences for sequence_mean, else response tokens (those kept)."""
    if reduction == "sequence_mean":
        return len(rollouts) if keep is None else sum(bool(kept.any()) for kept in keep)
    return sum(len(r.response_ids) for r in rollouts) if keep is None else sum(int(kept.sum()) for kept in keep)


def _batch(rollouts: tuple[Rollout, ...], layout: Layout, pad_id: int, device: torch.device | str) -> Batch:
    """All response tokens of the rollouts, with weight 1."""
    responses = [r.response_ids for r in rollouts]
    sizes = torch.tensor([len(r) for r in responses])
    sequence_index = torch.repeat_interleave(torch.arange(len(rollouts)), sizes).to(device)
    sampler_logp = None
    if all(r.sampler_logp is not None for r in rollouts):
        sampler_logp = torch.tensor([x for r in rollouts for x in r.sampler_logp or ()], device=device)
    return Batch(
        sequences=layout_sequences(
            [r.prompt_ids for r in rollouts], responses, layout=layout, pad_id=pad_id, device=device
        ),
        response_ids=torch.tensor([t for r in responses for t in r], device=device),
        sequence_index=sequence_index,
        rollouts=rollouts,
        target=None,
        token_weights=torch.ones(len(sequence_index), device=device),
        sampler_logp=sampler_logp,
    )


def with_target(batch: Batch, target: AnyTarget | None) -> Batch:
    """The batch with what the teacher says about *all* response tokens of its rollouts; those that are not kept are left out."""
    if target is None:
        return batch
    expected = sum(len(r.response_ids) for r in batch.rollouts)
    if len(target) != expected:
        raise OpdError(
            f"The teacher scored {len(target)} positions for {expected} response tokens; "
            "a target has one row per response token, the EOS of a finished response included."
        )
    return dataclasses.replace(batch, target=target if batch.kept is None else _rows(target, batch.kept))


def keep_tokens(batch: Batch, keep: torch.Tensor) -> Batch:
    """A whole batch without the response tokens where `keep` is False. Their positions are still read, but no head sees them."""
    assert batch.kept is None and batch.target is None
    sequences = dataclasses.replace(batch.sequences, predict_index=batch.sequences.predict_index[keep])
    return dataclasses.replace(
        batch,
        sequences=sequences,
        response_ids=batch.response_ids[keep],
        sequence_index=batch.sequence_index[keep],
        token_weights=batch.token_weights[keep],
        sampler_logp=None if batch.sampler_logp is None else batch.sampler_logp[keep],
        advantages=None if batch.advantages is None else batch.advantages[keep],
        kept=keep,
    )


def group_by_length(lengths: Sequence[int], *, budget: int, layout: Layout) -> list[list[int]]:
    """Which sequences share a micro-batch: longest first, so that padding stays small; ties keep their order."""
    groups: list[list[int]] = []
    cost = 0  # of the group being filled
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        added = lengths[index] if layout == "packed" or not groups else lengths[groups[-1][0]]
        if groups and cost + added <= budget:
            groups[-1].append(index)
            cost += added
        else:
            groups.append([index])
            cost = lengths[index]
    return groups


def concatenate(targets: Sequence[AnyTarget], device: torch.device | str) -> AnyTarget:
    """Targets of one kind, and of one teacher where they refer to its head, as one on the student's device."""
    first = targets[0]
    if any(type(t) is not type(first) for t in targets):
        raise OpdError("A micro-batch mixes kinds of target; a teacher hands out one kind per run.")
    if isinstance(first, SampledTarget):
        return SampledTarget(teacher_logp=_cat(targets, "teacher_logp", device))
    if isinstance(first, DenseTarget):
        return DenseTarget(logits=_cat(targets, "logits", device))
    if isinstance(first, HiddenTarget):
        assert all(t.head is first.head for t in targets if isinstance(t, HiddenTarget)), "one teacher per micro-batch"
        return HiddenTarget(
            hidden=_cat(targets, "hidden", first.head.weight.device), head=first.head
        )  # multiplied there
    if isinstance(first, TeacherMixture):
        return _concatenate_mixtures([t for t in targets if isinstance(t, TeacherMixture)], device)
    assert isinstance(first, TopKTarget)
    return TopKTarget(
        ids=_cat(targets, "ids", device),
        teacher_logp=_cat(targets, "teacher_logp", device),
        sampled_logp=None if first.sampled_logp is None else _cat(targets, "sampled_logp", device),
    )


def _concatenate_mixtures(mixtures: Sequence[TeacherMixture], device: torch.device | str) -> TeacherMixture:
    """Each teacher's targets side by side, and the weights of every token."""
    members = [concatenate(list(column), device) for column in zip(*(m.targets for m in mixtures), strict=True)]
    weights = [m.weights.expand(len(m), len(m.targets)) for m in mixtures]
    return TeacherMixture(
        targets=tuple(members),  # pyright: ignore[reportArgumentType]
        weights=torch.cat(weights).to(device),
        mixture=mixtures[0].mixture,
    )


def _cat(targets: Sequence[AnyTarget], name: str, device: torch.device | str) -> torch.Tensor:
    return torch.cat([getattr(t, name) for t in targets]).to(device)


def one_rollout(batch: Batch, index: int) -> Batch:
    """Rollout `index` of a micro-batch, alone, with the weights it had."""
    tokens = batch.sequence_index == index
    rollout = batch.rollouts[index]
    device = batch.response_ids.device
    sequences = layout_sequences(
        [rollout.prompt_ids], [rollout.response_ids], layout="right_padded", pad_id=0, device=device
    )
    kept = None
    if batch.kept is not None:
        kept = batch.kept.split([len(r.response_ids) for r in batch.rollouts])[index]
        sequences = dataclasses.replace(sequences, predict_index=sequences.predict_index[kept])
    return Batch(
        sequences=sequences,
        response_ids=batch.response_ids[tokens],
        sequence_index=torch.zeros_like(batch.sequence_index[tokens]),
        rollouts=(rollout,),
        target=None if batch.target is None else _rows(batch.target, tokens),
        token_weights=batch.token_weights[tokens],
        sampler_logp=None if batch.sampler_logp is None else batch.sampler_logp[tokens],
        advantages=None if batch.advantages is None else batch.advantages[tokens],
        kept=kept,
    )


def _rows(target: AnyTarget, keep: torch.Tensor) -> AnyTarget:
    if isinstance(target, TeacherMixture):
        members = tuple(_rows(member, keep) for member in target.targets)
        weights = target.weights if target.weights.dim() == 1 else target.weights[keep]
        return dataclasses.replace(target, targets=members, weights=weights)

    def cut(value: object) -> object:
        return value[keep.to(value.device)] if isinstance(value, torch.Tensor) else value

    return dataclasses.replace(target, **{f.name: cut(getattr(target, f.name)) for f in dataclasses.fields(target)})

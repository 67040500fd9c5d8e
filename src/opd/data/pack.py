"""Rollouts and targets → micro-batches. The one shift by one lives here.

A model's output at position i predicts token i + 1. The response starts at position len(prompt), so its tokens are predicted
by positions len(prompt) − 1 … len(prompt) + len(response) − 2. The last response token predicts nothing and is not fed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import accumulate
from typing import Any, Literal

import torch

from opd.errors import DataError, OpdError
from opd.losses import Reduction, token_weights
from opd.types import AnyTarget, Batch, HiddenTarget, Rollout, Sequences, TeacherMixture

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
    rows = 1 if layout == "packed" else len(inputs)
    total = width * rows
    ids = torch.full((total,), pad_id, dtype=torch.long)
    positions = torch.zeros(total, dtype=torch.long)
    mask = torch.zeros(total, dtype=torch.long)
    predict: list[torch.Tensor] = []
    for start, row, prompt, response in zip(starts, inputs, prompts, responses, strict=True):
        ids[start : start + len(row)] = torch.tensor(row)
        positions[start : start + len(row)] = torch.arange(len(row))
        mask[start : start + len(row)] = 1
        first = start + len(prompt) - 1
        predict.append(torch.arange(first, first + len(response)))
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
    that count: response tokens for token_mean, sequences for sequence_mean, the constant for fixed. `advantages` are one tensor
    per rollout, one number per response token. `keep` is a mask of the same shape; tokens outside it are neither trained on nor
    counted.
    """
    lengths = [len(r.prompt_ids) + len(r.response_ids) - 1 for r in rollouts]
    if global_count is None:
        global_count = count_of(rollouts, reduction, keep)
    batches: list[Batch] = []
    for members in group_by_length(lengths, budget=tokens_per_microbatch, layout=layout):
        batch = _whole_batch(tuple(rollouts[i] for i in members), layout, pad_id, device)
        if advantages is not None:
            batch = replace(batch, advantages=torch.cat([advantages[i] for i in members]).to(device))
        if keep is not None:
            batch = keep_tokens(batch, torch.cat([keep[i] for i in members]).to(device))
        sizes = torch.bincount(batch.sequence_index, minlength=len(members))
        weights = token_weights(batch.sequence_index, sizes, reduction=reduction, global_count=global_count)
        target = None if targets is None else concatenate([targets[i] for i in members], device)
        batches.append(with_target(replace(batch, token_weights=weights), target))
    return batches


def count_of(rollouts: Sequence[Rollout], reduction: Reduction, keep: Sequence[torch.Tensor] | None = None) -> int:
    """The divisor of these rollouts' losses: sequences for sequence_mean, else response tokens (those kept)."""
    sizes = [len(r.response_ids) for r in rollouts] if keep is None else [int(kept.sum()) for kept in keep]
    return sum(size > 0 for size in sizes) if reduction == "sequence_mean" else sum(sizes)


def _whole_batch(rollouts: tuple[Rollout, ...], layout: Layout, pad_id: int, device: torch.device | str) -> Batch:
    """All response tokens of the rollouts, with weight 1."""
    prompts, responses = [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts]
    sizes = torch.tensor([len(r) for r in responses])
    sequence_index = torch.repeat_interleave(torch.arange(len(rollouts)), sizes).to(device)
    sampler_logp = None
    if all(r.sampler_logp is not None for r in rollouts):
        sampler_logp = torch.tensor([x for r in rollouts for x in r.sampler_logp or ()], device=device)
    return Batch(
        sequences=layout_sequences(prompts, responses, layout=layout, pad_id=pad_id, device=device),
        response_ids=torch.tensor([t for r in responses for t in r], device=device),
        sequence_index=sequence_index,
        rollouts=rollouts,
        target=None,
        token_weights=torch.ones(len(sequence_index), device=device),
        sampler_logp=sampler_logp,
    )


def with_target(batch: Batch, target: AnyTarget | None) -> Batch:
    """The batch with its teacher's target, which has a row for *every* response token; rows of tokens not kept are dropped."""
    if target is None:
        return batch
    expected = sum(len(r.response_ids) for r in batch.rollouts)
    if len(target) != expected:
        raise OpdError(
            f"The teacher scored {len(target)} positions for {expected} response tokens; "
            "a target has one row per response token, the EOS of a finished response included."
        )
    return replace(batch, target=target if batch.kept is None else _select_rows(target, batch.kept))


def keep_tokens(batch: Batch, keep: torch.Tensor) -> Batch:
    """A whole batch without the response tokens where `keep` is False. The model reads them, but no head sees their positions."""
    assert batch.kept is None and batch.target is None
    sequences = replace(batch.sequences, predict_index=batch.sequences.predict_index[keep])
    return replace(_select_tokens(batch, keep), sequences=sequences, kept=keep)


def one_rollout(batch: Batch, index: int) -> Batch:
    """Rollout `index` of a micro-batch, alone, with the weights it had."""
    tokens = batch.sequence_index == index
    rollout = batch.rollouts[index]
    sequences = layout_sequences(
        [rollout.prompt_ids],
        [rollout.response_ids],
        layout="right_padded",
        pad_id=0,
        device=batch.response_ids.device,
    )
    kept = None
    if batch.kept is not None:
        kept = torch.split(batch.kept, [len(r.response_ids) for r in batch.rollouts])[index]
        sequences = replace(sequences, predict_index=sequences.predict_index[kept])
    alone = _select_tokens(batch, tokens)
    zeros = torch.zeros_like(alone.sequence_index)
    return replace(alone, sequences=sequences, sequence_index=zeros, rollouts=(rollout,), kept=kept)


def group_by_length(lengths: Sequence[int], *, budget: int, layout: Layout) -> list[list[int]]:
    """Groups of sequences that share a micro-batch: longest first, so that padding stays small; ties keep their order."""
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
    if isinstance(first, TeacherMixture):
        return _concatenate_mixtures([t for t in targets if isinstance(t, TeacherMixture)], device)
    if isinstance(first, HiddenTarget):
        assert all(t.head is first.head for t in targets if isinstance(t, HiddenTarget)), "one teacher per micro-batch"
        device = first.head.weight.device  # where the states are multiplied
    joined = {name: torch.cat([getattr(target, name) for target in targets]).to(device) for name in _tensors_of(first)}
    return replace(first, **joined)


def _concatenate_mixtures(mixtures: Sequence[TeacherMixture], device: torch.device | str) -> TeacherMixture:
    """Each teacher's targets side by side, and the weights of every token."""
    members: Any = tuple(
        concatenate(list(column), device) for column in zip(*(m.targets for m in mixtures), strict=True)
    )
    weights = [m.weights.expand(len(m), len(m.targets)) for m in mixtures]
    return replace(mixtures[0], targets=members, weights=torch.cat(weights).to(device))


def _select_tokens(batch: Batch, tokens: torch.Tensor) -> Batch:
    """The batch with only those rows of everything that is flat over response tokens; its sequences stay."""
    per_token = ("response_ids", "sequence_index", "token_weights", "sampler_logp", "advantages")
    flat = {name: value[tokens] for name in per_token if (value := getattr(batch, name)) is not None}
    return replace(batch, **flat, target=None if batch.target is None else _select_rows(batch.target, tokens))


def _select_rows(target: AnyTarget, keep: torch.Tensor) -> AnyTarget:
    if isinstance(target, TeacherMixture):
        members: Any = tuple(_select_rows(member, keep) for member in target.targets)
        weights = target.weights if target.weights.dim() == 1 else target.weights[keep]
        return replace(target, targets=members, weights=weights)
    return replace(target, **{name: value[keep.to(value.device)] for name, value in _tensors_of(target).items()})


def _tensors_of(target: AnyTarget) -> dict[str, torch.Tensor]:
    values = {field.name: getattr(target, field.name) for field in fields(target)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

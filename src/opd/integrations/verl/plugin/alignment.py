"""verl's micro-batch, flat over its response tokens: which outputs predict them, what each weighs, who drew it."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss
from verl.workers.utils.padding import no_padding_2_padding

from opd.integrations.verl.plugin.packed_reading import followed
from opd.integrations.verl.plugin.weights import Weights
from opd.losses._shapes import Bool, Float, Int
from opd.teachers.vocabulary import VocabularyMatch


@dataclass(frozen=True, kw_only=True)
class ResponseTokens:
    """The response tokens that count, in the order of the sequences."""

    packed_index: Int[Tensor, " tokens"]
    """Position, among all tokens of the micro-batch without padding, whose output predicts the token."""
    model_index: Int[Tensor, " tokens"]
    """The same position in what the model is given, flattened: with padding where the model gets padding."""
    row_index: Int[Tensor, " tokens"]
    """The same position where each sequence is a row, padded to the longest."""
    ids: Int[Tensor, " tokens"]
    sequence_index: Int[Tensor, " tokens"]
    position: Int[Tensor, " tokens"]
    """In the response, from 0."""
    weights: Float[Tensor, " tokens"]
    """What verl's loss_agg_mode multiplies the token's loss by, the number of data-parallel ranks included."""
    sampler_logp: Float[Tensor, " tokens"] | None
    known: Bool[Tensor, " tokens"]
    """Whether it is a token of student and teachers. verl's engines may draw others: rows that pad the output layer."""
    followed: Bool[Tensor, " tokens"]
    """Whether every teacher can read what stands before it; one may have no row for a padding row of the student."""

    def at(self, rows: Int[Tensor, " some"]) -> ResponseTokens:
        """Some of them."""

        def cut(value: Any) -> Any:
            return None if value is None else value[rows]

        return ResponseTokens(**{field.name: cut(getattr(self, field.name)) for field in fields(self)})


def response_positions(micro_batch: Any) -> Int[Tensor, " tokens"]:
    """Positions, among all tokens of the micro-batch without padding, whose outputs predict the response tokens that count.

    The shift by one is verl's own: its function that cuts log-probs to the responses is given positions instead.
    """
    values = micro_batch["input_ids"].values()
    at = no_padding_2_padding(torch.arange(len(values), device=values.device), micro_batch)
    return at[_padded(micro_batch, "response_mask").bool()]


def response_tokens(
    micro_batch: Any, *, packed: bool, reduction: Mapping[str, Any], vocabulary: VocabularyMatch, rows: int
) -> ResponseTokens:
    """The response tokens that count. `rows` is the number of ids that every teacher has an embedding for."""
    input_ids = micro_batch["input_ids"]
    offsets, values = input_ids.offsets(), input_ids.values()
    mask = _padded(micro_batch, "response_mask").bool()
    index = response_positions(micro_batch)
    row_index = _in_rows(offsets)[index]
    counts = {name: micro_batch[name] for name in ("dp_size", "batch_num_tokens", "global_batch_size")}
    scale = {"loss_agg_mode": "token-mean", **{k: v for k, v in reduction.items() if v is not None}}
    sampler = next((name for name in ("rollout_log_probs", "old_log_probs") if name in micro_batch), None)
    return ResponseTokens(
        packed_index=index,
        model_index=index if packed else row_index,
        row_index=row_index,
        ids=values[index + 1],
        known=vocabulary.owns(values[index + 1]),
        followed=followed(values, offsets, index, rows),
        sequence_index=mask.nonzero()[:, 0],
        position=mask.nonzero()[:, 1],
        weights=_weights(mask, **counts, **scale)[mask],
        sampler_logp=None if sampler is None else _padded(micro_batch, sampler)[mask].float(),
    )


def _padded(micro_batch: Any, name: str) -> Tensor:
    """[sequences, longest response] as verl's losses see it."""
    return micro_batch.select(name).to_padded_tensor()[name]


def _weights(mask: Tensor, **aggregation: Any) -> Tensor:
    """Aggregation is linear in the losses, so its gradient is the weight of each: every mode verl has, as verl counts it."""
    losses = torch.zeros(mask.shape, device=mask.device, requires_grad=True)
    with torch.enable_grad():
        (weights,) = torch.autograd.grad(agg_loss(losses, mask.float(), **aggregation), losses)
    return weights


def _in_rows(offsets: Tensor) -> Tensor:
    """Where each token is when sequences are rows, padded on the right to the longest, and the rows are flattened."""
    lengths = offsets.diff()
    row = torch.repeat_interleave(torch.arange(len(lengths), device=offsets.device), lengths)
    column = torch.arange(int(offsets[-1]), device=offsets.device) - offsets[:-1][row]
    return row * int(lengths.max()) + column


def advantages_of(micro_batch: Any, tokens: ResponseTokens) -> Float[Tensor, " tokens"]:
    """verl's advantage of each response token."""
    return _padded(micro_batch, "advantages")[tokens.sequence_index, tokens.position]


def with_advantages(micro_batch: Any, advantage: Tensor, tokens: ResponseTokens, weights: Weights) -> Any:
    """The micro-batch with λ_rl A + λ_distill (log q − log p) in place of verl's advantages A."""
    theirs = micro_batch["advantages"]
    padded = _padded(micro_batch, "advantages")
    added = weights.distill * advantage.to(padded.dtype)
    at = (tokens.sequence_index, tokens.position)
    combined = (weights.rl * padded).index_put(at, added, accumulate=True)
    if theirs.is_nested:  # V1; the older trainer pads
        lengths = theirs.offsets().diff().tolist()
        rows = [row[:length] for row, length in zip(combined, lengths, strict=True)]
        combined = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    changed = micro_batch.copy()
    changed["advantages"] = combined
    return changed

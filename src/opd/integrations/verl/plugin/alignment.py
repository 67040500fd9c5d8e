"""The response tokens of verl's micro-batch as flat tensors: the outputs that predict them, their weights and samplers' log-probs.

With sequence parallelism (DeepSpeed-Ulysses, arXiv 2309.14509) each rank of a group reads a slice of the packed micro-batch, as verl cuts it.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils.ulysses import gather_outputs_and_unpad
from verl.workers.utils.padding import no_padding_2_padding

from opd.errors import require
from opd.integrations.verl.plugin.packed_reading import followed
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
    """The factor of the token's loss in verl's loss_agg_mode, the number of data-parallel ranks included."""
    sampler_logp: Float[Tensor, " tokens"] | None
    known: Bool[Tensor, " tokens"]
    """True for a token of student and teachers. verl's engines may draw others: rows that pad the output layer."""
    followed: Bool[Tensor, " tokens"]
    """True where every teacher has an embedding for all tokens before it; a padding row of the student may have none."""

    def at(self, rows: Int[Tensor, " some"]) -> ResponseTokens:
        """The tokens at these indices."""

        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        cut: dict[str, Any] = {name: None if value is None else value[rows] for name, value in values.items()}
        return ResponseTokens(**cut)


def response_positions(micro_batch: Any) -> Int[Tensor, " tokens"]:
    """Positions, among all tokens of the micro-batch without padding, whose outputs predict the response tokens that count.

    The shift by one is verl's own: its function that cuts log-probs to the responses is given positions instead.
    """
    values = micro_batch["input_ids"].values()
    at = no_padding_2_padding(torch.arange(len(values), device=values.device), micro_batch)
    return at[padded(micro_batch, "response_mask").bool()]


def rollout_temperature(micro_batch: Any, who: str = "on-policy distillation", instead: str = "") -> float:
    """The temperature that the samples were drawn at, by which verl's engine divides the student's logits. Raises ConfigError."""
    values = torch.as_tensor(micro_batch["temperature"], dtype=torch.float32).unique()
    require(
        len(values) == 1,
        f"the samples of one micro-batch were drawn at several temperatures; {who} takes one. Set one "
        f"actor_rollout_ref.rollout.temperature{instead}.",
    )
    return float(values)


def response_tokens(
    micro_batch: Any, *, packed: bool, reduction: Mapping[str, Any], vocabulary: VocabularyMatch, rows: int
) -> ResponseTokens:
    """The response tokens that count. `rows` is the number of ids that every teacher has an embedding for."""
    input_ids = micro_batch["input_ids"]
    offsets, values = input_ids.offsets(), input_ids.values()
    mask = padded(micro_batch, "response_mask").bool()
    index = response_positions(micro_batch)
    # The position of each token when sequences are rows, padded on the right to the longest, and the rows are flattened.
    lengths = offsets.diff()
    row = torch.repeat_interleave(torch.arange(len(lengths), device=offsets.device), lengths)
    column = torch.arange(int(offsets[-1]), device=offsets.device) - offsets[:-1][row]
    row_index = (row * int(lengths.max()) + column)[index]
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
        sampler_logp=None if sampler is None else padded(micro_batch, sampler)[mask].float(),
    )


def padded(micro_batch: Any, name: str) -> Tensor:
    """[sequences, longest response] as verl's losses see it."""
    return micro_batch.select(name).to_padded_tensor()[name]


def _weights(mask: Tensor, **aggregation: Any) -> Tensor:
    """Aggregation is linear in the losses, so its gradient is the weight of each: every mode verl has, as verl counts it."""
    losses = torch.zeros(mask.shape, device=mask.device, requires_grad=True)
    with torch.enable_grad():
        (weights,) = torch.autograd.grad(agg_loss(losses, mask.float(), **aggregation), losses)
    return weights


def with_advantages(
    micro_batch: Any, advantage: Tensor, tokens: ResponseTokens, *, rl_weight: float, distill_weight: float
) -> Any:
    """The micro-batch with λ_rl A + λ_distill (log q − log p) in place of verl's advantages A."""
    theirs, rows = micro_batch["advantages"], padded(micro_batch, "advantages")
    added = distill_weight * advantage.to(rows.dtype)
    at = (tokens.sequence_index, tokens.position)
    combined = (rl_weight * rows).index_put(at, added, accumulate=True)
    if theirs.is_nested:  # V1; the older trainer pads
        lengths = theirs.offsets().diff().tolist()
        rows = [row[:length] for row, length in zip(combined, lengths, strict=True)]
        combined = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    changed = micro_batch.copy()
    changed["advantages"] = combined
    return changed


@dataclass(frozen=True, kw_only=True)
class SequenceSlice:
    """The slice of a micro-batch that this rank's model reads; the whole without sequence parallelism."""

    group: Any = None
    """None is all of it."""
    ranks: int = 1
    first: int = 0
    """Packed position that the slice starts at."""
    length: int = 0
    padding: int = 0
    """Positions behind the last token, in the last slices."""

    def own(self, tokens: ResponseTokens) -> ResponseTokens:
        """The response tokens that this rank's outputs predict; each is one rank's."""
        if self.group is None:
            return tokens
        here = (tokens.packed_index >= self.first) & (tokens.packed_index < self.first + self.length)
        own = tokens.at(here.nonzero().squeeze(-1))
        return replace(own, model_index=own.packed_index - self.first)

    def everywhere(self, values: Float[Tensor, " own"], own: ResponseTokens, length: int) -> Float[Tensor, " tokens"]:
        """Values of all `length` tokens of the micro-batch, from every rank; 0 where none is a response token's.

        Every rank goes on with the same numbers, so backward counts this rank's slice `ranks` times: FSDP's mean over ranks follows.
        """
        if self.group is None:
            return values.new_zeros(length).index_copy(0, own.packed_index, values)
        mine = values.new_zeros(self.length).index_copy(0, own.model_index, values)
        return gather_outputs_and_unpad(mine, gather_dim=0, unpad_dim=0, padding_size=self.padding, group=self.group)

    def total(self, value: Tensor) -> Tensor:
        """The sum over the ranks of a group, without a gradient."""
        value = value.detach().clone()
        if self.group is not None:
            dist.all_reduce(value, group=self.group)
        return value


def sequence_slice(engine: Any, micro_batch: Any, output_args: Mapping[str, Any]) -> SequenceSlice:
    """The slice that verl's engine cut for this rank: equal ones, of the packed tokens and the padding behind them."""
    if not engine.use_ulysses_sp:
        return SequenceSlice()
    group, padding = engine.ulysses_parallel_group, int(output_args["pad_size"])
    ranks = dist.get_world_size(group)
    length = (len(micro_batch["input_ids"].values()) + padding) // ranks
    return SequenceSlice(group=group, ranks=ranks, first=dist.get_rank(group) * length, length=length, padding=padding)


def whole_group(engine: Any) -> Any:
    """The ranks that share out a mini-batch's tokens: data-parallel ones, and those that share a sequence."""
    return dist.group.WORLD if engine.use_ulysses_sp else engine.get_data_parallel_group()

"""Sequence parallelism (DeepSpeed-Ulysses, arXiv 2309.14509), as verl does it: each rank of a group reads a slice of the packed micro-batch."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch import distributed as dist
from verl.utils.ulysses import gather_outputs_and_unpad

from opd.integrations.verl.plugin.alignment import ResponseTokens
from opd.losses._shapes import Float


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

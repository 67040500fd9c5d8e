"""How a model in verl's FSDP engine reads a micro-batch: packed, or in rows where packed sequences would see each other."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.utils.ulysses import gather_outputs_and_unpad

from opd.errors import ConfigError
from opd.losses._shapes import Bool, Int
from opd.teachers.packing import mixes_packed

BOUNDS = ("cu_seqlens", "cu_seqlens_cpu")
"""verl's names for where packed sequences start; it passes them to models whose forward takes them."""
MROPE_ROWS = 4  # of position ids: the text's, then time, height and width


def packed(micro_batch: Any) -> bool:
    """Whether verl packs the sequences of a micro-batch."""
    return bool(tu.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True))


def autocast(engine: Any) -> torch.autocast:
    """The precision that verl's engine computes in."""
    return torch.autocast(get_device_name(), engine._autocast_dtype, enabled=engine._autocast_dtype != torch.float32)


def takes_bounds(module: Any, student: Any) -> bool:
    """Whether a teacher is told where packed sequences start: as verl tells the student, where both models' forward asks for it."""
    return getattr(student, "pass_packed_cu_seqlens", False) and BOUNDS[0] in signature(module.forward).parameters


def readable(teacher: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the student reads, without what the teacher's forward would not take, and with some token in place of ids that the teacher
    has no row for: what it says from there on is not used (`followed`)."""
    taken = {name: value for name, value in inputs.items() if name not in BOUNDS or teacher.pass_packed_cu_seqlens}
    ids = taken["input_ids"]
    return {**taken, "input_ids": ids.masked_fill(ids >= teacher.rows, 0)}


def followed(
    ids: Int[Tensor, " tokens"], offsets: Int[Tensor, " sequences+1"], positions: Int[Tensor, " predicted"], rows: int
) -> Bool[Tensor, " predicted"]:
    """Whether a model of so many embedding rows can read its sequence up to and with each position."""
    unreadable = torch.nn.functional.pad((ids >= rows).cumsum(0), (1, 0))
    start = offsets[torch.searchsorted(offsets, positions, right=True) - 1]
    return unreadable[positions + 1] == unreadable[start]


def mixes(engine: Any, processor: Any = None) -> bool:
    """Whether the engine's model lets packed sequences see each other, by a few tokens through the sharded model itself.

    A collective: every rank has to ask. `processor` is the student's, which settles the form of verl's position ids.
    """
    rows = MROPE_ROWS if hasattr(processor, "get_rope_index") else 1
    if not engine.model_config.use_remove_padding:
        return False
    with engine.eval_mode():
        found = mixes_packed(lambda sequences: _logits(engine, sequences, rows))
    for part in engine.module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # FSDP2 keeps layers gathered for a backward pass, which does not come
    return found


@torch.no_grad()
def _logits(engine: Any, sequences: Sequence[Sequence[int]], rows: int) -> Tensor:
    """[tokens, vocab] of packed sequences, by the inputs that verl itself makes for this engine."""
    lengths = [len(sequence) for sequence in sequences]
    ids = torch.tensor(list(chain.from_iterable(sequences)))
    positions = torch.cat([torch.arange(length) for length in lengths])
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    jagged = torch.nested.nested_tensor_from_jagged
    if rows == 1:
        position_ids = jagged(positions, offsets)
    else:
        position_ids = jagged(positions.expand(rows, -1).clone(), offsets, jagged_dim=2)
    micro_batch = tu.get_tensordict(
        {"input_ids": jagged(ids, offsets), "position_ids": position_ids},
        {"temperature": 1.0, "use_remove_padding": True, "use_fused_kernels": False, "pad_token_id": 0},
    ).to(get_device_id())
    inputs, given = engine.prepare_model_inputs(micro_batch=micro_batch)
    with autocast(engine):
        logits = engine.module(**inputs, use_cache=False).logits.squeeze(0)
    if engine.use_ulysses_sp:
        group = engine.ulysses_parallel_group
        logits = gather_outputs_and_unpad(
            logits, gather_dim=0, unpad_dim=0, padding_size=given["pad_size"], group=group
        )
    return logits[: len(ids)]


def reads_rows(engine: Any, who: str, processor: Any = None) -> bool:
    """Whether the engine's model has to read every sequence in a row of its own; `mixes` asks, and rank 0 says so.

    Raises ConfigError where ranks share a sequence, so that there are no rows.
    """
    if not mixes(engine, processor):
        return False
    what = f"the {who} ({engine.model_config.hf_config.model_type}) lets packed sequences see each other"
    if engine.use_ulysses_sp:
        raise ConfigError(
            f"{what}, or needs more of a sequence than the slice that one of {engine.ulysses_sequence_parallel_size} ranks has, so that "
            "every loss would be wrong. Set actor_rollout_ref.actor.ulysses_sequence_parallel_size=1."
        )
    if engine.rank == 0:
        advice = " Set actor_rollout_ref.model.use_remove_padding=False if verl's reference policy runs, too."
        print(
            f"on-policy distillation: {what}, so it reads each in a row of its own, padded to the longest."
            f"{advice if who == 'student' else ''}",
            flush=True,
        )
    return True


def refuse_mixing(student: Any) -> None:
    """Raise ConfigError for a student that would mix packed sequences, where verl alone prepares its inputs. A collective."""
    if mixes(student, student.model_config.processor):
        raise ConfigError(
            f"the student ({student.model_config.hf_config.model_type}) lets packed sequences see each other, so that every loss and "
            "every log-prob would be wrong. Set actor_rollout_ref.model.use_remove_padding=False."
        )


def in_rows(micro_batch: Any) -> Any:
    """The micro-batch with the flag that makes verl pad each sequence to a row of its own."""
    apart = micro_batch.copy()
    tu.assign_non_tensor(apart, use_remove_padding=False)
    return apart

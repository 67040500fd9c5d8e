"""Traces of micro-batches: token ids, weights and losses, from which other code can compute a loss again."""

# pyright: reportMissingImports=false
from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from opd.integrations.verl.plugin.alignment import ResponseTokens


def write_trace(
    folder: str, rank: int, number: int, input_ids: Tensor, tokens: ResponseTokens, per_token: Tensor
) -> None:
    """`rank<r>_<n>.safetensors`: sequences one after the other with their offsets; of each response token that counted, the
    position before it, its weight and its loss."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        "input_ids": input_ids.values(),
        "offsets": input_ids.offsets(),  # pyright: ignore[reportAttributeAccessIssue]
        "predict_index": tokens.packed_index,
        "weights": tokens.weights,
        "loss": per_token,
    }
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path / f"rank{rank}_{number:06d}.safetensors"
    )

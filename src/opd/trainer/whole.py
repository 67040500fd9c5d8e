"""Tensors of which every rank has a part, made whole and divided again. A tensor that is not divided is left as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from opd.ranks import Ranks


def is_divided(tensor: torch.Tensor) -> bool:
    """True for a DTensor, whose class takes seconds to import."""
    return hasattr(tensor, "full_tensor")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part."""
    divided: Any = tensor
    return divided.to_local() if is_divided(tensor) else tensor


def whole_tensor(tensor: torch.Tensor, ranks: Ranks) -> torch.Tensor | None:
    """The whole of a tensor in main memory on rank 0, and None elsewhere. Every rank has to ask for a divided one."""
    divided: Any = tensor.detach()
    full = divided.full_tensor() if is_divided(tensor) else divided
    return full.cpu().contiguous() if ranks.first else None


def divided_like(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor as `like` is divided; every rank has all of it and takes its part. One that is divided already is left as it is."""
    divided: Any = like
    if not is_divided(like) or is_divided(full):
        return full
    from torch.distributed.tensor import distribute_tensor

    full = full.to(like.device, like.dtype)
    return distribute_tensor(full, divided.device_mesh, divided.placements, src_data_rank=None)


def divided_state(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The whole state of an optimizer, with moments divided as the parameters are that it has here."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        place: {
            name: divided_like(value, parameters[place]) if name != "step" else value for name, value in moments.items()
        }
        for place, moments in saved["state"].items()
    }
    return {**saved, "state": state}

"""Moments that wait in main memory while their optimizer takes no step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

HOME = torch.device("cpu")


@contextmanager
def moments_on(device: torch.device, optimizer: torch.optim.Optimizer, home: torch.device = HOME) -> Iterator[None]:
    """The optimizer's moments are on `device` inside, and at home outside."""
    move_moments(optimizer, device)
    try:
        yield
    finally:
        move_moments(optimizer, home)


def move_moments(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Move what the optimizer keeps for each entry; its counts of updates stay beside the parameters, where fused steps need them."""
    for moments in optimizer.state.values():
        for name, value in moments.items():
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                moments[name] = value.to(device)

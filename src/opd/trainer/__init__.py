"""The single-machine trainer: `train(config)` runs a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd.trainer.run import train

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        from opd.trainer.run import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

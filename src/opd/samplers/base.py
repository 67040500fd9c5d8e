"""What a sampler is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from opd.types import Prompt, Rollout


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()


class Sampler(Protocol):
    def sample(self, prompts: Sequence[Prompt], *, seed: int) -> list[Rollout]:
        """One rollout per prompt, in order: a pure function of the weights, the prompts and the seed."""
        ...

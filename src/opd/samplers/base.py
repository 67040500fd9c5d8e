"""The sampler protocol, the one place where rollouts get their ids and groups, and the one rule of where a response ends."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from opd.errors import OpdError
from opd.types import Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from opd.data.rendering import Renderer


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of drawing responses."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()


class SampledStudent(Protocol):
    """The student as a sampler sees it."""

    model: PreTrainedModel
    version: int
    """Updates that the weights have had."""


class Sampler(Protocol):
    """Draws the responses of a run. Any object with these methods is one: nothing has to be inherited."""

    def sample(self, prompts: Sequence[Prompt], *, seed: int) -> list[Rollout]:
        """One rollout per prompt, in order: a pure function of the weights, the prompts and the seed."""
        ...

    def load(self, student: SampledStudent) -> None:
        """The next rollouts are of these weights. Called before the first step and after every update."""
        ...

    def limit(self, max_new_tokens: int) -> None:
        """Responses from now on end at this length."""
        ...


class AdjustableSampler(Sampler, Protocol):
    """A sampler that can also draw in another way, which evaluations need."""

    def with_sampling(self, sampling: Sampling) -> Sampler:
        """A sampler of the same weights that draws as told; this one stays as it is."""
        ...


def draw(sampler: Sampler, prompts: Sequence[Prompt], samples_per_prompt: int, *, seed: int) -> list[Rollout]:
    """`samples_per_prompt` rollouts of every prompt, each with its `id` and `group`. Raises OpdError for a sampler that answers other
    prompts than it was asked, or in another order."""
    asked = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
    rollouts = sampler.sample(asked, seed=seed)
    if len(rollouts) != len(asked) or any(r.prompt.index != p.index for r, p in zip(rollouts, asked, strict=True)):
        raise OpdError(
            f"{type(sampler).__name__}.sample returned {len(rollouts)} rollouts for {len(asked)} prompts, or not in their order. It has to "
            "return one per prompt, in order, each with the prompt that it answers."
        )
    return [replace(r, id=i, group=i // samples_per_prompt) for i, r in enumerate(rollouts)]


def response_end(
    response: Sequence[int], *, eos_ids: Collection[int], stop: Sequence[str], renderer: Renderer
) -> tuple[int, bool]:
    """Length of the response, its EOS included, and whether it ended by itself. What an engine put behind the first EOS is padding
    whatever its id, so pad == eos cannot hide an EOS."""

    def stopped(end: int) -> bool:
        text = renderer.decode(response[:end])
        return any(s in text for s in stop)

    length = next((t + 1 for t, token in enumerate(response) if token in eos_ids), None)
    finished = length is not None
    length = len(response) if length is None else length
    if stop and stopped(length):
        return bisect.bisect_left(range(1, length + 1), True, key=stopped) + 1, True
    return length, finished

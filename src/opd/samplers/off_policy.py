"""On-policy and off-policy samples in one batch: the λ of GKD (arXiv 2306.13649), per sample."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from opd.data.rendering import Renderer
from opd.errors import DataError
from opd.samplers.base import Sampling
from opd.samplers.hf import HfSampler
from opd.seeding import derive_seed
from opd.types import Prompt, Rollout


class DatasetResponses:
    """The data set's own responses as off-policy rollouts."""

    def __init__(self, renderer: Renderer, max_new_tokens: int, *, eos_ids: Sequence[int] = ()) -> None:
        self.renderer = renderer
        self.eos_ids = tuple(eos_ids)
        self.max_new_tokens = max_new_tokens

    def sample(self, prompts: Sequence[Prompt], *, seed: int) -> list[Rollout]:
        """Deterministic; the seed is not used. Raises DataError for a prompt without a response."""
        return [self._rollout(prompt) for prompt in prompts]

    def _rollout(self, prompt: Prompt) -> Rollout:
        if prompt.response is None:
            raise DataError(
                f"Prompt {prompt.index} has no response, and rollout.lmbda < 1 with off_policy=dataset needs one for every "
                "prompt. Add a 'response' column, set rollout.off_policy=teacher, or rollout.lmbda=1."
            )
        ids = self.renderer.reference_ids(prompt, self.eos_ids)
        finished = len(ids) <= self.max_new_tokens
        kept = tuple(ids[: self.max_new_tokens])
        return Rollout(
            prompt=prompt,
            prompt_ids=self.renderer.prompt_ids(prompt),
            response_ids=kept,
            sampler_logp=None,
            finished=finished,
            policy_version=-1,
            source="dataset",
            text=self.renderer.decode(kept),
        )


class OnOffPolicySampler:
    """Each sample is on-policy with probability `lmbda`."""

    def __init__(
        self,
        on_policy: HfSampler,
        off_policy: HfSampler | RoutedSampler | DatasetResponses | None,
        lmbda: float,
    ) -> None:
        self.on_policy = on_policy
        self.off_policy = off_policy
        self.lmbda = lmbda

    def limit(self, max_new_tokens: int) -> None:
        """Responses from now on end at this length."""
        for sampler in (self.on_policy, self.off_policy):
            if isinstance(sampler, DatasetResponses):
                sampler.max_new_tokens = max_new_tokens
            elif sampler is not None:
                sampler.sampling = replace(sampler.sampling, max_new_tokens=max_new_tokens)

    def sample(self, prompts: Sequence[Prompt], *, seed: int) -> list[Rollout]:
        """One rollout per prompt, in order; a pure function of weights, prompts and seed."""
        if self.off_policy is None or self.lmbda == 1:
            return self.on_policy.sample(prompts, seed=seed)
        draw = random.Random(derive_seed(seed, 0, "lmbda"))
        on = [draw.random() < self.lmbda for _ in prompts]
        merged: dict[int, Rollout] = {}
        for sampler, wanted in ((self.on_policy, True), (self.off_policy, False)):
            members = [i for i, is_on in enumerate(on) if is_on is wanted]
            if members:
                purpose = "on_policy" if wanted else "off_policy"
                drawn = sampler.sample([prompts[i] for i in members], seed=derive_seed(seed, 1, purpose))
                merged |= zip(members, drawn, strict=True)
        return [merged[i] for i in range(len(prompts))]


class RoutedSampler:
    """Each prompt is answered by one of several samplers: the one that `weights` gives it, drawn where it gives more than one."""

    def __init__(self, samplers: Mapping[str, HfSampler], weights: Callable[[Prompt], Mapping[str, float]]) -> None:
        self.samplers = dict(samplers)
        self.weights = weights

    @property
    def sampling(self) -> Sampling:
        return next(iter(self.samplers.values())).sampling

    @sampling.setter
    def sampling(self, value: Sampling) -> None:
        for sampler in self.samplers.values():
            sampler.sampling = value

    def sample(self, prompts: Sequence[Prompt], *, seed: int) -> list[Rollout]:
        """One rollout per prompt, in order; a pure function of weights, prompts and seed."""
        draw = random.Random(derive_seed(seed, 0, "which"))
        chosen = []
        for prompt in prompts:
            weights = self.weights(prompt)
            chosen.append(draw.choices(list(weights), weights=list(weights.values()))[0])
        merged: dict[int, Rollout] = {}
        for name, sampler in self.samplers.items():
            members = [i for i, choice in enumerate(chosen) if choice == name]
            if members:
                drawn = sampler.sample([prompts[i] for i in members], seed=derive_seed(seed, 1, name))
                merged |= zip(members, drawn, strict=True)
        return [merged[i] for i in range(len(prompts))]

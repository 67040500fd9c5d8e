"""On-policy and off-policy samples in one batch: the λ of GKD (arXiv 2306.13649), per sample."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from opd.data.rendering import Renderer
from opd.errors import DataError
from opd.samplers.base import AdjustableSampler, SampledStudent, Sampler, Sampling
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

    def load(self, student: SampledStudent) -> None:
        """Nothing to do: a data set has no weights."""

    def limit(self, max_new_tokens: int) -> None:
        """Longer responses are cut here."""
        self.max_new_tokens = max_new_tokens

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

    def __init__(self, on_policy: Sampler, off_policy: Sampler, lmbda: float) -> None:
        self.on_policy = on_policy
        self.off_policy = off_policy
        self.lmbda = lmbda

    def load(self, student: SampledStudent) -> None:
        """Hands the weights to the on-policy sampler; the other does not follow the student."""
        self.on_policy.load(student)

    def limit(self, max_new_tokens: int) -> None:
        """Both samplers' responses end at this length."""
        self.on_policy.limit(max_new_tokens)
        self.off_policy.limit(max_new_tokens)

    def sample(self, prompts: Sequence[Prompt], *, seed: int) -> list[Rollout]:
        """One rollout per prompt, in order; a pure function of weights, prompts and seed."""
        if self.lmbda == 1:
            return self.on_policy.sample(prompts, seed=seed)
        rng = random.Random(derive_seed(seed, 0, "lmbda"))
        chosen = ["on_policy" if rng.random() < self.lmbda else "off_policy" for _ in prompts]
        return _sample_by({"on_policy": self.on_policy, "off_policy": self.off_policy}, chosen, prompts, seed)


class RoutedSampler:
    """Each prompt is answered by one of several samplers: the one that `weights` gives it, drawn where it gives more than one."""

    def __init__(
        self, samplers: Mapping[str, AdjustableSampler], weights: Callable[[Prompt], Mapping[str, float]]
    ) -> None:
        self.samplers = dict(samplers)
        self.weights = weights

    def load(self, student: SampledStudent) -> None:
        """Hands the weights to every sampler."""
        for sampler in self.samplers.values():
            sampler.load(student)

    def limit(self, max_new_tokens: int) -> None:
        """All samplers' responses end at this length."""
        for sampler in self.samplers.values():
            sampler.limit(max_new_tokens)

    def with_sampling(self, sampling: Sampling) -> Sampler:
        """The same choice among samplers that draw as told."""
        told = {name: sampler.with_sampling(sampling) for name, sampler in self.samplers.items()}
        return RoutedSampler(told, self.weights)  # pyright: ignore[reportArgumentType]

    def sample(self, prompts: Sequence[Prompt], *, seed: int) -> list[Rollout]:
        """One rollout per prompt, in order; a pure function of weights, prompts and seed."""
        rng = random.Random(derive_seed(seed, 0, "which"))
        chosen = []
        for prompt in prompts:
            weights = self.weights(prompt)
            chosen.append(rng.choices(list(weights), weights=list(weights.values()))[0])
        return _sample_by(self.samplers, chosen, prompts, seed)


def _sample_by(
    samplers: Mapping[str, Sampler], chosen: Sequence[str], prompts: Sequence[Prompt], seed: int
) -> list[Rollout]:
    """Every prompt's rollout from the sampler chosen for it, in the order of the prompts."""
    merged: dict[int, Rollout] = {}
    for name, sampler in samplers.items():
        members = [i for i, choice in enumerate(chosen) if choice == name]
        if members:
            drawn = sampler.sample([prompts[i] for i in members], seed=derive_seed(seed, 1, name))
            merged |= zip(members, drawn, strict=True)
    return [merged[i] for i in range(len(prompts))]

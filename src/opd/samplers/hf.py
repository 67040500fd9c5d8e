"""Sampling with transformers `generate`: batched, seeded, with the log-probs of the distribution really sampled from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from opd.data.rendering import Renderer
from opd.models import context_length
from opd.ranks import ALONE, Ranks
from opd.samplers.base import SampledStudent, Sampling, response_end
from opd.samplers.drawing import Draw, uniform_numbers
from opd.samplers.generation import Generator, Row
from opd.samplers.split import parts_of
from opd.teachers.vocabulary import VocabularyMatch
from opd.types import Prompt, Rollout, RolloutSource


class HfSampler:
    """Draws responses from a model in this process. No gradient flows through sampling."""

    def __init__(
        self,
        model: PreTrainedModel,
        renderer: Renderer,
        sampling: Sampling,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        vocabulary: VocabularyMatch,
        batch_size: int = 256,
        source: RolloutSource = "student",
        student_renderer: Renderer | None = None,
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
        model_context: Callable[[], AbstractContextManager[None]] = nullcontext,
        record_entropy: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        """With several `ranks` each draws a share, and every one has all rollouts. `student_renderer` renders the prompt kept in the rollout when the model that samples is the teacher. `model_context` is
        entered around every use (it moves an offloaded model to its device, or disables an adapter)."""
        self.ranks = ranks
        self.model_context = model_context
        self.record_entropy = record_entropy
        self.model = model
        self.renderer = renderer
        self.student_renderer = student_renderer
        self.sampling = sampling
        self.eos_ids = tuple(eos_ids)
        self.pad_id = pad_id
        self.vocabulary = vocabulary
        self.batch_size = batch_size
        self.source: RolloutSource = source
        self.autocast = autocast
        self.policy_version = 0
        self.watch: Callable[[Sequence[Sequence[int]]], object] | None = None
        """Called after every token with the responses of the batch so far, as token ids."""

    def sample(self, prompts: Sequence[Prompt], *, seed: int) -> list[Rollout]:
        """One rollout per prompt, in order. The same weights, prompts and seed give the same rollouts; the global random state is
        left as it was. Raises DataError for a prompt longer than the context."""
        with self.model_context():
            return self._sample(prompts, seed)

    def load(self, student: SampledStudent) -> None:
        """Takes the student's version alone: its weights are those of `model` already."""
        self.policy_version = student.version

    def limit(self, max_new_tokens: int) -> None:
        """Responses from now on end at this length."""
        self.sampling = replace(self.sampling, max_new_tokens=max_new_tokens)

    def with_sampling(self, sampling: Sampling) -> HfSampler:
        """The same model, drawn from as told."""
        other = copy.copy(self)
        other.sampling = sampling
        return other

    def _sample(self, prompts: Sequence[Prompt], seed: int) -> list[Rollout]:
        limit = context_length(self.model)
        prompt_ids = []
        for prompt in prompts:
            ids = self.renderer.prompt_ids(prompt)
            if limit is not None:
                self.renderer.check_length(prompt, ids, self.sampling.max_new_tokens, limit)
            prompt_ids.append(ids)
        # Neighbours in length share a batch, so that short prompts do not pay for long ones.
        order = sorted(range(len(prompts)), key=lambda i: len(prompt_ids[i]))
        drawn: dict[int, Row] = {}
        greedy = self.sampling.temperature == 0
        for part in parts_of(len(order), self.batch_size, self.ranks):
            members = order[part.start : part.stop]
            uniforms = None if greedy else uniform_numbers(seed, members, self.sampling.max_new_tokens)
            drawn |= zip(members, self._generate([prompt_ids[i] for i in members], uniforms), strict=True)
        for others in self.ranks.gather(drawn):
            drawn |= others
        return [self._rollout(prompts[i], prompt_ids[i], *drawn[i]) for i in range(len(prompts))]

    def _rollout(
        self,
        prompt: Prompt,
        prompt_ids: tuple[int, ...],
        response: list[int],
        logp: list[float],
        entropy: list[float],
    ) -> Rollout:
        length, finished = response_end(response, eos_ids=self.eos_ids, stop=self.sampling.stop, renderer=self.renderer)
        kept = tuple(response[:length])
        greedy = self.sampling.temperature == 0
        if self.student_renderer is not None:
            prompt_ids = self.student_renderer.prompt_ids(prompt)
        return Rollout(
            prompt=prompt,
            prompt_ids=prompt_ids,
            response_ids=kept,
            sampler_logp=None if greedy else tuple(logp[:length]),
            sampler_entropy=tuple(entropy[:length]) if self.record_entropy else None,
            finished=finished,
            policy_version=self.policy_version,
            source=self.source,
            text=self.renderer.decode(kept),
        )

    def _generate(self, prompt_ids: Sequence[tuple[int, ...]], uniforms: torch.Tensor | None) -> list[Row]:
        stop = self.sampling.stop
        generator = Generator(
            model=self.model,
            max_new_tokens=self.sampling.max_new_tokens,
            eos_ids=self.eos_ids,
            pad_id=self.pad_id,
            processors=self._processors,
            stopped=_StopStrings(self.renderer, stop) if stop else None,
            show=self.watch,
            entropy=self.record_entropy,
        )
        with _plain_generation_config(self.model), self.autocast():
            return generator.rows(prompt_ids, uniforms)

    def _processors(self, draw: Draw) -> LogitsProcessorList:
        processors = LogitsProcessorList([_VocabularyMask(self.vocabulary)])
        if self.sampling.temperature not in (0, 1):
            processors.append(TemperatureLogitsWarper(float(self.sampling.temperature)))
        if self.sampling.top_k:
            processors.append(TopKLogitsWarper(self.sampling.top_k))
        if self.sampling.top_p < 1:
            processors.append(TopPLogitsWarper(self.sampling.top_p))
        processors.append(draw)
        return processors


class _StopStrings:
    """Says in which rows a stop string appears in the response. A token may hold one byte, so that many tokens are looked back at."""

    def __init__(self, renderer: Renderer, stop: Sequence[str]) -> None:
        self.renderer = renderer
        self.stop = tuple(stop)
        self.window = max(len(s.encode()) for s in stop) + 4  # 4: the longest UTF-8 character, cut at the window's edge

    def __call__(self, ids: torch.Tensor, prompt_width: int) -> list[bool]:
        start = max(prompt_width, ids.shape[1] - self.window)
        texts = [self.renderer.decode(row) for row in ids[:, start:].tolist()]
        return [any(s in text for s in self.stop) for text in texts]


class _VocabularyMask(LogitsProcessor):
    """Padding rows of the head and ids without a token cannot be sampled."""

    def __init__(self, vocabulary: VocabularyMatch) -> None:
        self.size = vocabulary.size
        self.invalid = torch.tensor(vocabulary.invalid_ids, dtype=torch.long)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.shape[-1] == self.size and not len(self.invalid):
            return scores
        scores = scores.clone()
        scores[:, self.size :] = -torch.inf
        return scores.index_fill_(-1, self.invalid.to(scores.device), -torch.inf)


@contextmanager
def _plain_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """`generate` fills what a generation config leaves open from the model's own one (a released model may carry a repetition
    penalty or top_k = 20). Rollouts must come from the model's plain distribution, so its own config is set aside, also inside
    a peft model, which copies the outer one inwards."""
    kept = {m: m.__dict__["generation_config"] for m in model.modules() if "generation_config" in m.__dict__}
    for module in kept:
        setattr(module, "generation_config", GenerationConfig())  # noqa: B010 - a Module's attributes are typed as tensors
    try:
        yield
    finally:
        for module in model.modules():
            if module in kept:
                module.generation_config = kept[module]
            else:
                module.__dict__.pop("generation_config", None)

"""Sampling with transformers `generate`: batched, seeded, with the log-probs of the distribution really sampled from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from opd.data.rendering import Renderer
from opd.models import context_length
from opd.ranks import ALONE, Ranks
from opd.samplers.base import SampledStudent, Sampling, response_end
from opd.samplers.split import Share, parts_of
from opd.seeding import derive_seed, seeded
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
        drawn: dict[int, tuple[list[int], list[float], list[float]]] = {}
        for part in parts_of(len(order), self.batch_size, self.ranks):
            members = order[part.start : part.stop]
            share = Share(part, derive_seed(seed, part.batch.start, "generate"), self.model.device)
            with seeded(share.seed, self.model.device):
                drawn |= zip(members, self._generate([prompt_ids[i] for i in members], share), strict=True)
        for part in self.ranks.gather(drawn):
            drawn |= part
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

    @torch.no_grad()
    def _generate(
        self, prompt_ids: Sequence[tuple[int, ...]], share: Share
    ) -> list[tuple[list[int], list[float], list[float]]]:
        """Per row: token ids, their log-probs, and the entropies where they are recorded."""
        device = self.model.device
        width = max(map(len, prompt_ids))
        rows = [[self.pad_id] * (width - len(p)) + list(p) for p in prompt_ids]
        mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompt_ids]
        recorder = _Recorder(width, entropy=self.record_entropy)
        criteria = [_StopStrings(self.renderer, self.sampling.stop, width)] if self.sampling.stop else []
        criteria += [] if self.watch is None else [_Watched(self.watch, width)]
        with _plain_generation_config(self.model), self.autocast():
            output = self.model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=self._generation_config(),
                logits_processor=self._processors(recorder, share),
                stopping_criteria=StoppingCriteriaList(criteria),
            )
        assert isinstance(output, torch.Tensor)
        responses = output[:, width:]
        logp = recorder.finish(output).tolist()
        entropy = recorder.entropies().tolist() if self.record_entropy else [[] for _ in logp]
        return list(zip(responses.tolist(), logp, entropy, strict=True))

    def _generation_config(self) -> GenerationConfig:
        # The warpers in _processors do all of it, so that the recorder sees the result.
        greedy = self.sampling.temperature == 0
        switched_off = {} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        return GenerationConfig(
            **switched_off,
            max_new_tokens=self.sampling.max_new_tokens,
            eos_token_id=list(self.eos_ids),
            pad_token_id=self.pad_id,
        )

    def _processors(self, recorder: _Recorder, share: Share) -> LogitsProcessorList:
        processors = LogitsProcessorList([_VocabularyMask(self.vocabulary)])
        if self.sampling.temperature not in (0, 1):
            processors.append(TemperatureLogitsWarper(float(self.sampling.temperature)))
        if self.sampling.top_k:
            processors.append(TopKLogitsWarper(self.sampling.top_k))
        if self.sampling.top_p < 1:
            processors.append(TopPLogitsWarper(self.sampling.top_p))
        processors.append(recorder)
        if share.partial and self.sampling.temperature != 0:
            processors.append(share)
        return processors


class _StopStrings(StoppingCriteria):
    """A row is done when a stop string appears in its response. A token may hold one byte, so that many tokens are looked back at."""

    def __init__(self, renderer: Renderer, stop: Sequence[str], prompt_width: int) -> None:
        self.renderer = renderer
        self.stop = tuple(stop)
        self.width = prompt_width
        self.window = max(len(s.encode()) for s in stop) + 4  # 4: the longest UTF-8 character, cut at the window's edge

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        start = max(self.width, input_ids.shape[1] - self.window)
        texts = [self.renderer.decode(row) for row in input_ids[:, start:].tolist()]
        done = [any(s in text for s in self.stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)


class _Watched(StoppingCriteria):
    """Shows the responses so far to somebody, and stops none."""

    def __init__(self, show: Callable[[Sequence[Sequence[int]]], object], prompt_width: int) -> None:
        self.show = show
        self.width = prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.show(input_ids[:, self.width :].tolist())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


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


class _Recorder(LogitsProcessor):
    """Log-prob of every sampled token, without keeping a [steps, rows, vocab] stack: step t's distribution is looked up when step
    t + 1 shows which token was drawn."""

    def __init__(self, prompt_width: int, *, entropy: bool = False) -> None:
        self.width = prompt_width
        self.entropy = entropy
        self.entropy_columns: list[torch.Tensor] = []
        self.last: torch.Tensor | None = None
        self.columns: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._take(input_ids)
        self.last = scores
        if self.entropy:
            self.entropy_columns.append(torch.special.entr(scores.float().softmax(-1)).sum(-1))
        return scores

    def _take(self, ids: torch.Tensor) -> None:
        if self.last is not None:
            drawn = ids[:, self.width + len(self.columns)].unsqueeze(-1)
            scores = self.last.float()
            self.columns.append(scores.gather(-1, drawn).squeeze(-1) - scores.logsumexp(-1))

    def entropies(self) -> torch.Tensor:
        """[rows, steps], nats."""
        return torch.stack(self.entropy_columns, dim=1)

    def finish(self, ids: torch.Tensor) -> torch.Tensor:
        self._take(ids)
        return torch.stack(self.columns, dim=1)


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

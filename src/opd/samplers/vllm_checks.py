"""Before the first step: the engine's answers against the student's own forward pass on the same ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from opd.data.pack import layout_sequences
from opd.errors import ServerError
from opd.models import response_logits
from opd.samplers.base import SampledStudent, Sampling
from opd.samplers.vllm import Answer, AnswerCheck, Draw, Engine, Request
from opd.seeding import derive_seed

PROBES, PROBE_TOKENS = 4, 16
PROBE_TEMPERATURE = 0.5  # far from 1, so that log-probs before and after temperature differ
TOLERANCE = {torch.float32: 1e-3}
COARSE_TOLERANCE = 0.05  # mean over the probes' tokens, for weights or products of 16 bits


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """A few short responses: raw log-probs are told from those of the sampler, and other weights from the student's."""

    prompts: Sequence[tuple[int, ...]]
    needed_len: int
    """Tokens of the longest prompt of the run with its response."""
    pad_id: int
    rows: int
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext
    half: bool = False
    """The engine computes in 16 bits."""

    def __call__(self, engine: Engine, student: SampledStudent, draw: Draw, check: AnswerCheck) -> None:
        """Raises ServerError that says what is different."""
        if engine.max_model_len < self.needed_len:
            raise ServerError(
                f"{engine.name} takes {engine.max_model_len} tokens, and the longest prompt with rollout.max_new_tokens needs "
                f"{self.needed_len}. Start it with --max-model-len {self.needed_len} (rollout.vllm.max_model_len), or lower max_new_tokens."
            )
        room = min(PROBE_TOKENS, draw.sampling.max_new_tokens)
        probing = replace(draw, sampling=Sampling(max_new_tokens=room, temperature=PROBE_TEMPERATURE))
        requests = [
            Request(prompt_ids=ids, seed=derive_seed(0, place, "preflight"))
            for place, ids in enumerate(self.prompts[:PROBES])
        ]
        answers = engine.generate(requests, probing)
        for answer, request in zip(answers, requests, strict=True):
            check(answer, request, room)
        self._compare(engine.name, student, requests, answers, probing.excluded_ids)

    @torch.no_grad()
    def _compare(
        self,
        name: str,
        student: SampledStudent,
        requests: Sequence[Request],
        answers: Sequence[Answer],
        excluded: Sequence[int],
    ) -> None:
        model = student.model
        ids = torch.tensor([i for answer in answers for i in answer.response_ids], device=model.device)
        theirs = torch.tensor([x for answer in answers for x in answer.logp], device=model.device)
        sequences = layout_sequences(
            [request.prompt_ids for request in requests],
            [answer.response_ids for answer in answers],
            layout="right_padded",
            pad_id=self.pad_id,
            device=model.device,
        )
        with self.autocast():
            logits = response_logits(model, sequences).float()
        logits[:, list(excluded)] = -torch.inf

        def gap(temperature: float) -> float:
            logp = (logits / temperature).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
            return float((logp - theirs).abs().mean())

        tolerance = COARSE_TOLERANCE if self.half else TOLERANCE.get(model.dtype, COARSE_TOLERANCE)
        own = gap(PROBE_TEMPERATURE)
        if own <= tolerance:
            return
        if gap(1.0) <= tolerance:
            raise ServerError(
                f"{name} gives log-probs of the model before temperature, top-p and top-k, and training needs those of the distribution that it "
                "samples from. Start it with --logprobs-mode processed_logprobs."
            )
        raise ServerError(
            f"{name} and the student disagree about the same tokens by {own:.3g} nats in the mean (at most {tolerance:g} is rounding): it "
            "computes with other weights or in another precision, or reads ids as another tokenizer's. Start it with the student's own folder, "
            "without quantization, and with the dtype that the student computes in."
        )

"""A teacher behind an inference server draws answers of its own, to be measured before a run. Nothing is trained on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from opd.data.rendering import Renderer
from opd.errors import ServerError
from opd.remote.questions import Answer, BadAnswer, Question, Request
from opd.samplers.base import SampledStudent, Sampling, response_end
from opd.seeding import derive_seed
from opd.types import Prompt, Rollout

if TYPE_CHECKING:
    from opd.teachers.server import RemoteTeacher

TOKEN_ID = "token_id:"  # how vLLM writes an id in the place of a token's text


@dataclass(frozen=True, kw_only=True)
class Written:
    """An answer as the server wrote it."""

    ids: tuple[int, ...]
    finished: bool
    """It ended by itself, and its last id is the one that ended it."""


class Writer(Protocol):
    """One kind of server, as it is asked for an answer of its own."""

    def request(self, model: str, prompt_ids: Sequence[int], sampling: Sampling, seed: int) -> Request:
        """Asks for one answer to one prompt."""
        ...

    def read(self, answer: Answer) -> Written:
        """The answer's token ids. Raises ServerError for text alone, and BadAnswer for what may be better the next time."""
        ...


class VllmWriter:
    """/v1/completions with token ids in the answer."""

    def request(self, model: str, prompt_ids: Sequence[int], sampling: Sampling, seed: int) -> Request:
        body = _completion(model, prompt_ids, sampling, seed)
        return Request(path="/v1/completions", json=body | {"top_k": sampling.top_k or -1, "return_token_ids": True})

    def read(self, answer: Answer) -> Written:
        choice = _choice(answer)
        return _written(answer, choice.get("token_ids"), choice.get("finish_reason") == "stop")


class OpenAiWriter:
    """/v1/completions with ids in the places of the tokens' texts."""

    def request(self, model: str, prompt_ids: Sequence[int], sampling: Sampling, seed: int) -> Request:
        body = _completion(model, prompt_ids, sampling, seed)
        return Request(path="/v1/completions", json=body | {"logprobs": 1, "return_tokens_as_token_ids": True})

    def read(self, answer: Answer) -> Written:
        choice = _choice(answer)
        scores = choice.get("logprobs")
        tokens = [str(one) for one in (scores.get("tokens") or [])] if isinstance(scores, Mapping) else []
        numbers = [one.removeprefix(TOKEN_ID) for one in tokens if one.startswith(TOKEN_ID)]
        ids = [int(one) for one in numbers if one.isdecimal()]
        return _written(answer, ids if len(ids) == len(tokens) else None, choice.get("finish_reason") == "stop")


class SglangWriter:
    """/generate, whose log-probs hold the ids; what ended the answer may stand beside them alone."""

    def request(self, model: str, prompt_ids: Sequence[int], sampling: Sampling, seed: int) -> Request:
        settings = {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
        }
        body = {"input_ids": list(prompt_ids), "sampling_params": settings, "return_logprob": True}
        return Request(path="/generate", json=body)

    def read(self, answer: Answer) -> Written:
        said = answer.json()
        meta = said.get("meta_info") if isinstance(said, Mapping) else None
        given = meta.get("output_token_logprobs") if isinstance(meta, Mapping) else None
        reason = meta.get("finish_reason") if isinstance(meta, Mapping) else None
        if not isinstance(given, list) or not isinstance(reason, Mapping):
            raise BadAnswer("an answer without meta_info.output_token_logprobs and its finish_reason")
        ids = [entry[1] if isinstance(entry, list) and len(entry) > 1 else None for entry in given]
        end = reason.get("matched")
        if isinstance(end, int) and (not ids or ids[-1] != end):
            ids.append(end)
        return _written(answer, ids, reason.get("type") == "stop")


WRITERS: Mapping[str, type[Writer]] = {"vllm": VllmWriter, "openai": OpenAiWriter, "sglang": SglangWriter}


class ServedSampler:
    """Draws a served teacher's own answers to its own rendering of the prompts; the rollouts hold the student's rendering."""

    def __init__(self, teacher: RemoteTeacher, sampling: Sampling, student_renderer: Renderer) -> None:
        self.teacher = teacher
        self.sampling = sampling
        self.student_renderer = student_renderer
        self._writer = WRITERS[teacher.dialect.name]()

    def with_sampling(self, sampling: Sampling) -> ServedSampler:
        """A sampler of the same server that draws as told."""
        return ServedSampler(self.teacher, sampling, self.student_renderer)

    def load(self, student: SampledStudent) -> None:
        """Nothing to do: the server has its own weights."""

    def limit(self, max_new_tokens: int) -> None:
        """Answers from now on end at this length."""
        self.sampling = replace(self.sampling, max_new_tokens=max_new_tokens)

    def sample(self, prompts: Sequence[Prompt], *, seed: int) -> list[Rollout]:
        """One answer per prompt, in order; servers that take no seed draw anew each time. Raises ServerError."""
        if self.teacher.probe is None:
            self.teacher.connect()
        questions = [self._question(prompt, derive_seed(seed, place, "served")) for place, prompt in enumerate(prompts)]
        written = self.teacher.pool.ask_all(questions)
        return [self._rollout(prompt, one) for prompt, one in zip(prompts, written, strict=True)]

    def _question(self, prompt: Prompt, seed: int) -> Question[Written]:
        teacher = self.teacher
        assert teacher.served_model is not None
        ids = teacher.prompt_ids(prompt)
        request = self._writer.request(teacher.served_model, ids, self.sampling, seed % (1 << 31))
        return Question(request=request, read=self._writer.read)

    def _rollout(self, prompt: Prompt, written: Written) -> Rollout:
        ids, finished, renderer = written.ids, written.finished, self.student_renderer
        if self.sampling.stop:
            end, stopped = response_end(ids, eos_ids=(), stop=self.sampling.stop, renderer=renderer)
            ids, finished = (ids[:end], True) if stopped else (ids, finished)
        known = self.teacher.vocabulary.with_stand_ins(torch.tensor(ids))
        return Rollout(
            prompt=prompt,
            prompt_ids=renderer.prompt_ids(prompt),
            response_ids=tuple(known.tolist()),
            sampler_logp=None,
            finished=finished,
            policy_version=0,
            text=renderer.decode(known.tolist()),
            source="teacher",
        )


def _completion(model: str, prompt_ids: Sequence[int], sampling: Sampling, seed: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(prompt_ids),
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": seed,
    }


def _choice(answer: Answer) -> Mapping[str, Any]:
    said = answer.json()
    choices = said.get("choices") if isinstance(said, Mapping) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise BadAnswer("an answer without the one choice that was asked for")
    return choices[0]


def _written(answer: Answer, ids: Any, finished: bool) -> Written:
    if not isinstance(ids, list) or not ids or not all(isinstance(i, int) and i >= 0 for i in ids):
        raise ServerError(
            f"{answer.server} writes text without token ids, which does not say which tokens were sampled."
        )
    return Written(ids=tuple(ids), finished=finished)

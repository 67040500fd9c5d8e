"""Sampling with vLLM: token ids in and out, log-probs of the distribution really sampled from, and weights that have a version.

`VllmSampler` knows what a rollout is; an `Engine` knows where vLLM runs: a server (vllm_server.py) or this process
(vllm_colocate.py). An answer whose weights are not the ones that were loaded last is an error, never a rollout.
"""

from __future__ import annotations

import copy
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from opd.data.rendering import Renderer
from opd.errors import ServerError
from opd.samplers.base import SampledStudent, Sampling, response_end
from opd.seeding import derive_seed
from opd.teachers.vocabulary import VocabularyMatch
from opd.types import Prompt, Rollout

MAX_LOGP_ROUNDING = 1e-3  # a log-prob may come out this much above 0
MAX_EXCLUDED = 1024  # ids with a bias that vLLM takes in a request (MAX_NUM_LOGIT_BIAS_TOKENS)
EXCLUDED_BIAS = -100.0  # the lowest that the API takes: e^-100 of a token's probability is left


@dataclass(frozen=True, kw_only=True)
class Request:
    """One response to draw."""

    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Settings that all requests of a call share."""

    sampling: Sampling
    eos_ids: tuple[int, ...]
    excluded_ids: tuple[int, ...] = ()
    """Ids that are never drawn."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A response as the engine gave it."""

    prompt_ids: tuple[int, ...] | None
    """The prompt that the engine read; None where it does not say."""
    response_ids: tuple[int, ...]
    logp: tuple[float, ...]
    """Of each response token."""
    reason: str
    """Why the response ended: 'stop' or 'length'."""
    versions: tuple[str, ...]
    """Tags of all weights that had a part in it."""


AnswerCheck = Callable[[Answer, Request, int], None]
"""Raises ServerError for an answer that cannot be right; the number is the most tokens that were asked for."""


class Engine(Protocol):
    """vLLM, wherever it runs."""

    name: str
    """In error messages."""
    max_model_len: int
    """Longest prompt and response together, known after the first `load`."""
    say: Callable[[str], None]
    """Called with lines for the person who watches the run."""

    def load(self, student: SampledStudent, tag: str) -> None:
        """Answers from now on come of these weights and carry this tag."""
        ...

    def generate(self, requests: Sequence[Request], draw: Draw) -> list[Answer]:
        """One answer per request, in order."""
        ...

    def close(self) -> None:
        """Ends what was started; may be called again."""
        ...


class VllmSampler:
    """Draws the student's responses from vLLM. Every prompt has a seed of its own, but vLLM's batches are not always the same, so that
    a repeated run need not repeat every bit."""

    def __init__(
        self,
        engine: Engine,
        renderer: Renderer,
        sampling: Sampling,
        *,
        eos_ids: Sequence[int],
        vocabulary: VocabularyMatch,
        rows: int,
        check: Callable[[Engine, SampledStudent, Draw, AnswerCheck], None] | None = None,
    ) -> None:
        """`rows` are those of the student's output layer. `check` is called once, after the first load: it asks the engine for a few
        responses and compares."""
        self.engine = engine
        self.renderer = renderer
        self.sampling = sampling
        self.eos_ids = tuple(eos_ids)
        self.vocabulary = vocabulary
        self.rows = rows
        self.check = check
        outside = (*vocabulary.invalid_ids, *range(vocabulary.size, rows))
        self.excluded_ids = outside if len(outside) <= MAX_EXCLUDED else ()
        """Ids that are no token of both sides. More of them than vLLM can exclude are drawn, and left out of the loss."""
        self.run = secrets.token_hex(4)  # two runs of one recipe have different tags
        self.tag = ""
        self.policy_version = 0

    def load(self, student: SampledStudent) -> None:
        """Hands the weights to the engine. Raises ServerError where they do not arrive."""
        tag = f"opd-{self.run}-{student.version}"
        self.engine.load(student, tag)
        self.tag, self.policy_version = tag, student.version
        if self.check is not None:
            self.check(self.engine, student, self._draw(), self._check_answer)
            self.check = None

    def limit(self, max_new_tokens: int) -> None:
        """Responses from now on end at this length."""
        self.sampling = replace(self.sampling, max_new_tokens=max_new_tokens)

    def with_sampling(self, sampling: Sampling) -> VllmSampler:
        """The same engine and weights, drawn from as told."""
        other = copy.copy(self)
        other.sampling = sampling
        return other

    def sample(self, prompts: Sequence[Prompt], *, seed: int) -> list[Rollout]:
        """One rollout per prompt, in order. Raises DataError for a prompt longer than the engine's context, ServerError for an engine
        that fails, or that answers from other weights than the last loaded ones."""
        if not self.tag:
            raise ServerError(f"{self.engine.name} has no weights of this run yet; call load(student) before sample.")
        requests = []
        for place, prompt in enumerate(prompts):
            ids = self.renderer.prompt_ids(prompt)
            self.renderer.check_length(prompt, ids, self.sampling.max_new_tokens, self.engine.max_model_len)
            requests.append(Request(prompt_ids=ids, seed=derive_seed(seed, place, "vllm")))
        answers = self.engine.generate(requests, self._draw())
        assert len(answers) == len(requests)
        return [self._rollout(*parts) for parts in zip(prompts, requests, answers, strict=True)]

    def _draw(self) -> Draw:
        return Draw(sampling=self.sampling, eos_ids=self.eos_ids, excluded_ids=self.excluded_ids)

    def _rollout(self, prompt: Prompt, request: Request, answer: Answer) -> Rollout:
        self._check_answer(answer, request, self.sampling.max_new_tokens)
        length, ended = response_end(
            answer.response_ids, eos_ids=self.eos_ids, stop=self.sampling.stop, renderer=self.renderer
        )
        kept = answer.response_ids[:length]
        return Rollout(
            prompt=prompt,
            prompt_ids=request.prompt_ids,
            response_ids=kept,
            sampler_logp=None if self.sampling.temperature == 0 else answer.logp[:length],
            finished=ended or answer.reason == "stop",
            policy_version=self.policy_version,
            text=self.renderer.decode(kept),
        )

    def _check_answer(self, answer: Answer, request: Request, most: int) -> None:
        """Raise ServerError for an answer that cannot be a sample of the weights that were loaded last."""
        ids, name = answer.response_ids, self.engine.name
        if set(answer.versions) != {self.tag}:
            others = ", ".join(sorted(set(answer.versions) - {self.tag})) or "no version"
            raise ServerError(
                f"{name} answered from weights {others}, and this run loaded {self.tag}: another run changes the weights of the same server, "
                "or it was started again. Give every run a server of its own (rollout.vllm.mode=managed starts one), and go on with --resume."
            )
        if answer.prompt_ids is not None and answer.prompt_ids != request.prompt_ids:
            raise ServerError(
                f"{name} read the prompt {list(answer.prompt_ids)[:8]} where {list(request.prompt_ids)[:8]} was sent (first ids shown): it adds "
                "or changes tokens. Use a vLLM server that takes token ids as they are."
            )
        if not ids or len(ids) != len(answer.logp):
            raise ServerError(
                f"{name} returned {len(ids)} token ids and {len(answer.logp)} log-probs for a response; both must be there, one for each token."
            )
        if len(ids) > most or answer.reason not in ("stop", "length"):
            raise ServerError(
                f"{name} returned a response of {len(ids)} tokens that ended by {answer.reason!r}; asked were at most "
                f"{most}. Look at the server's log."
            )
        if answer.reason == "length" and len(ids) < most:
            raise ServerError(
                f"{name} cut a response at {len(ids)} tokens of the {most} that were asked for: its context is "
                "full. Start it with a larger --max-model-len (rollout.vllm.max_model_len)."
            )
        outside = next((i for i in ids if not 0 <= i < self.rows), None)
        if outside is not None:
            raise ServerError(
                f"{name} sampled token {outside}, and the student's output layer has {self.rows} rows: it serves another model. Start it with "
                "the student's."
            )
        wrong = next((x for x in answer.logp if not (math.isfinite(x) and x <= MAX_LOGP_ROUNDING)), None)
        if wrong is not None:
            raise ServerError(
                f"{name} gave the log-prob {wrong} to a token that it sampled. Look for NaN in the weights, or lower optimizer.lr; the weights "
                "of the last checkpoint are untouched."
            )


def sampling_settings(draw: Draw) -> dict[str, Any]:
    """Every setting of vLLM that bears on a response: what is left out would come from the model's generation_config.json."""
    sampling = draw.sampling
    body: dict[str, Any] = {
        "n": 1,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "stop": list(sampling.stop),
        "include_stop_str_in_output": True,
        "skip_special_tokens": True,  # stop strings are looked for in text without them, as opd does
        "stop_token_ids": list(draw.eos_ids),
        "ignore_eos": True,  # the ids above alone: the server's own EOS may be another
        "logprobs": 0,
    }
    if draw.excluded_ids:
        body["logit_bias"] = dict.fromkeys(draw.excluded_ids, EXCLUDED_BIAS)
    return body

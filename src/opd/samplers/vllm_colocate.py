"""vLLM in this process: weights go straight from memory, and on CUDA vLLM's own memory is given back while the student is updated."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch

from opd.errors import MissingDependencyError, ServerError
from opd.samplers.base import SampledStudent
from opd.samplers.vllm import Answer, Draw, Request, sampling_settings
from opd.samplers.vllm_weights import SyncFolder, named_weights

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
"""The first keeps the engine in this process, which is what lets it read the student's memory."""


class ColocatedVllm:
    """An `Engine` beside the student. It is made by the first `load`, from a folder that is deleted again."""

    def __init__(self, sync: SyncFolder, options: dict[str, Any]) -> None:
        """`options` are those of `vllm.LLM` beside the model."""
        self.name = "vLLM in this process"
        self.max_model_len = 0
        self.say: Callable[[str], None] = lambda _: None
        self._sync, self._options = sync, options
        self._llm: Any = None
        self._asleep = False

    def load(self, student: SampledStudent, tag: str) -> None:
        """Copies the weights into the engine. Raises ServerError where it does not take them."""
        if self._llm is None:
            self._llm = self._started(student)
        llm: Any = self._llm
        self._wake()
        try:
            weights = named_weights(student.model, untied=self._sync.untied)
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        except (RuntimeError, ValueError, KeyError) as error:
            raise ServerError(
                f"{self.name} does not take the student's weights: {error}. Is {type(student.model).__name__} a model of vLLM's? Use "
                "rollout.engine=hf if it is not."
            ) from error
        if not llm.reset_prefix_cache():
            raise ServerError(
                f"{self.name} did not empty its prefix cache after new weights; this is a defect, use rollout.engine=hf."
            )
        llm.llm_engine.set_weight_version(tag)

    def generate(self, requests: Sequence[Request], draw: Draw) -> list[Answer]:
        """One answer per request, in order; then the engine sleeps, where the device has it."""
        from vllm import SamplingParams  # pyright: ignore[reportAttributeAccessIssue, reportMissingImports]  # it takes the file beside this one

        self._wake()
        settings = sampling_settings(draw)
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(request.prompt_ids)} for request in requests],
            [SamplingParams(**settings, seed=request.seed) for request in requests],
            use_tqdm=False,
        )
        self._sleep()
        return [_answer(output) for output in outputs]

    def close(self) -> None:
        """Give the memory back. A later `load` makes a new engine."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
        self._sync.remove()

    def _started(self, student: SampledStudent) -> Any:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            from vllm import LLM  # pyright: ignore[reportAttributeAccessIssue, reportMissingImports]
        except ImportError as error:
            raise MissingDependencyError(
                f"rollout.vllm.mode=colocate needs vLLM in the interpreter that runs opd ({error}). Install it there, or use mode=managed with "
                "rollout.vllm.python=/path/to/a/python/that/has/it."
            ) from error
        self.say("vLLM: starting in this process")
        folder = self._sync.write(student.model, student.version)
        threads = torch.get_num_threads()
        try:
            llm = LLM(
                model=str(folder),
                distributed_executor_backend="uni",
                logprobs_mode="processed_logprobs",
                generation_config="vllm",
                disable_log_stats=True,
                **self._options,
            )
        except (RuntimeError, ValueError, OSError, NotImplementedError) as error:
            raise ServerError(
                f"{self.name} could not start: {str(error).splitlines()[0]}. Lower or raise rollout.vllm.memory_share if it is about memory; "
                "mode=managed keeps it in a process of its own."
            ) from error
        finally:
            torch.set_num_threads(threads)  # vLLM takes all of them for itself
            shutil.rmtree(folder, ignore_errors=True)
        self.max_model_len = int(llm.llm_engine.model_config.max_model_len)
        return llm

    @property
    def _sleeps(self) -> bool:
        return bool(self._options.get("enable_sleep_mode"))

    def _sleep(self) -> None:
        if self._sleeps and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False


def _answer(output: Any) -> Answer:
    (completion,) = output.outputs
    ids = tuple(completion.token_ids)
    logp = tuple(float(row[token].logprob) for token, row in zip(ids, completion.logprobs, strict=True))
    return Answer(
        prompt_ids=tuple(output.prompt_token_ids),
        response_ids=ids,
        logp=logp,
        reason=str(completion.finish_reason),
        versions=tuple(span.version for span in completion.weight_versions or ()),
    )

"""`rollout.name=transformers`: the student samples, and a teacher scores, in Ray actors with a plain transformers model; no vLLM,
no GPU."""

# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import ray
import torch
from transformers import AutoModelForCausalLM
from verl.utils import normalize_token_ids
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import TokenOutput

from opd.errors import ConfigError
from opd.integrations.verl.dry_run import ROLLOUT_NAME
from opd.integrations.verl.dry_run.attention import NAME as ULYSSES
from opd.integrations.verl.dry_run.sampling import SamplingSettings, sample, score, seed_of
from opd.integrations.verl.plugin.model_checks import end_ids
from opd.integrations.verl.plugin.teachers.hidden_server import ModelReplica, ModelServer

TEACHER_ATTENTION = "sdpa"  # verl tells a teacher's server the path alone, and would have it use flash-attn


def server_name(replica_rank: int, suffix: str = "") -> str:
    """The Ray actor that serves a replica."""
    return f"opd_{ROLLOUT_NAME}_server_{replica_rank}{suffix}"


@ray.remote(num_cpus=0)
class SamplingServer(ModelServer):
    """Samples from the student, or scores with a teacher."""

    def __init__(self, config: Any, model_config: Any, replica_rank: int, attention: str | None = None) -> None:
        super().__init__()
        torch.set_num_threads(1)
        self.config = omega_conf_to_dataclass(config)
        model = omega_conf_to_dataclass(model_config)
        trained_with = model.hf_config._attn_implementation
        self.model = AutoModelForCausalLM.from_pretrained(
            model.local_path,
            dtype=torch.float32,
            attn_implementation=attention or ("sdpa" if trained_with == ULYSSES else trained_with),
        ).eval()
        self.stop_ids = end_ids(model.tokenizer, self.model.generation_config)
        self.replica_rank = replica_rank
        self.global_steps: int | None = None
        self.served: Counter[tuple[int, ...]] = Counter()

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **_images: Any
    ) -> TokenOutput:
        """One response. The seed counts the requests for the same prompt, so that their order among others does not matter."""
        prompt = normalize_token_ids(prompt_ids)
        given = dict(sampling_params)
        if given.get("prompt_logprobs") is not None:
            return await self._score(prompt, given["prompt_logprobs"])
        if given.get("repetition_penalty", 1.0) != 1.0:
            raise ConfigError("rollout.name=transformers has no repetition penalty; leave it at 1.0.")
        # Responses fill what the prompt leaves: verl pads both to prompt_length + response_length.
        room = self.config.prompt_length + self.config.response_length - len(prompt)
        limit = given.get("max_tokens", given.get("max_new_tokens", self.config.response_length))
        async with self.turn:
            number = self.served[tuple(prompt)]
            self.served[tuple(prompt)] += 1
            ids, logps = await asyncio.to_thread(
                sample,
                self.model,
                prompt,
                SamplingSettings(
                    **{one.name: given[one.name] for one in fields(SamplingSettings) if one.name in given}
                ),
                max_tokens=max(1, min(limit, room)),
                stop_ids=self.stop_ids if not self.config.ignore_eos else (),
                seed=seed_of(getattr(self.config, "seed", 0), self.global_steps, prompt, number),
            )
        return TokenOutput(
            token_ids=ids,
            log_probs=logps if given.get("logprobs", False) else None,
            stop_reason="completed",
            extra_fields={"global_steps": self.global_steps},
        )

    async def _score(self, ids: list[int], top_k: int) -> TokenOutput:
        """A teacher's scores of a sequence. The token that verl has every request generate is not read."""
        async with self.turn:
            tokens, logps = await asyncio.to_thread(score, self.model, ids, top_k)
        said = {"prompt_ids": tokens, "prompt_logprobs": logps, "global_steps": self.global_steps}
        return TokenOutput(token_ids=[0], stop_reason="completed", extra_fields=said)

    async def load(self, weights: dict[str, torch.Tensor], global_steps: int | None) -> None:
        """The trainer's weights, under the names of the model's state dict."""
        async with self.turn:
            missing, unexpected = self.model.load_state_dict(weights, strict=False)
            tied = set(self.model.all_tied_weights_keys)
            if unexpected or set(missing) - tied:
                raise ConfigError(
                    f"the trainer's weights do not fit the rollout model: missing {sorted(set(missing) - tied)[:3]}, unexpected "
                    f"{unexpected[:3]}. With LoRA, set actor_rollout_ref.model.lora.merge=True: merged weights are what is sent."
                )
            self.global_steps = global_steps
            self.served.clear()


class TransformersReplica(ModelReplica):
    """One server per replica, whatever parallel sizes vLLM would have had."""

    async def launch_servers(self) -> None:
        name = server_name(self.replica_rank, self.name_suffix)
        attention = TEACHER_ATTENTION if self.is_teacher_model else None
        server = SamplingServer.options(name=name, max_concurrency=self.max_concurrency)  # pyright: ignore[reportAttributeAccessIssue]
        await self.keep(server.remote(self.config, self.model_config, self.replica_rank, attention))


class WeightSender(BaseRollout):
    """The rollout in a trainer worker: it sends the weights. The first worker of each replica talks to the server."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        size = self.config.tensor_model_parallel_size * self.config.data_parallel_size
        rank = int(os.environ["RANK"])
        self.replica_rank = rank // size if replica_rank < 0 else replica_rank
        self.is_leader_rank = rank % size == 0

    async def resume(self, tags: list[str]) -> None:
        """Nothing was freed."""

    async def release(self) -> None:
        """Nothing to free."""

    async def update_weights(
        self, weights: Iterator[tuple[str, torch.Tensor]], wire_format: str = "named_tensors", **kwargs: Any
    ) -> None:
        """Every worker walks the weights, because gathering one is a collective; the leader sends them."""
        if wire_format != "named_tensors":
            raise ConfigError(
                f"rollout.name={ROLLOUT_NAME} takes whole tensors, not {wire_format}; set "
                "actor_rollout_ref.rollout.checkpoint_engine.backend=naive."
            )
        state = {name: tensor.detach().cpu().clone() for name, tensor in weights}
        if self.is_leader_rank:
            server = ray.get_actor(server_name(self.replica_rank))
            await server.load.remote(state, kwargs.get("global_steps"))

"""`inference.name=opd_hidden`: a teacher server that sends hidden states where vLLM would send log-probs.

One transformers model per GPU of verl's teacher pool, one sequence at a time. Its base classes serve the rollouts of a dry run, too.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from verl.utils import normalize_token_ids
from verl.utils.device import get_device_name
from verl.utils.fs import copy_to_local
from verl.workers.rollout.replica import RolloutMode, RolloutReplica, TokenOutput

from opd.errors import ConfigError
from opd.integrations.verl.plugin.head import hidden_states
from opd.teachers.vocabulary import embedding_rows


class ModelServer:
    """The part of a server that does not depend on its answers."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()

    async def address(self) -> str:
        return f"{ray.util.get_node_ip_address()}:{os.getpid()}"

    async def sleep(self) -> None:
        """Nothing: the model keeps its memory."""

    wake_up = abort_all_requests = resume_generation = clear_kv_cache = release_kv_cache = resume_kv_cache = sleep
    start_profile = stop_profile = sleep


class ModelReplica(RolloutReplica):
    """One server per replica. A subclass starts it in `launch_servers` and hands it to `keep`."""

    async def init_colocated(self, resource_pool: Any) -> None:
        """A teacher's weights never change, so it has no workers that bring it new ones."""
        if not self.is_teacher_model:
            await super().init_colocated(resource_pool)
            return
        self.rollout_mode, self.resource_pool = RolloutMode.COLOCATED, resource_pool
        await self.launch_servers()

    async def keep(self, server: Any) -> None:
        """Make the server known to verl."""
        self.servers = [server]
        self._server_handle = server
        self._server_address = await server.address.remote()


NAME = "opd_hidden"
"""Of these servers in verl's config, and of our part of their engine_kwargs."""


@torch.no_grad()
def read_states(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """The states that enter the output layer at every position, [tokens, hidden], on the CPU."""
    rows = embedding_rows(model)
    read = torch.tensor([ids], device=model.device)
    # Ids of the student's padding have no row here; the actor leaves out what is said after one.
    return hidden_states(model, {"input_ids": read.masked_fill(read >= rows, 0)}, None, "teacher").cpu()


def load_teacher(path: str, dtype: str, device: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The frozen model on its device, with an attention that every dtype has."""
    model = AutoModelForCausalLM.from_pretrained(
        copy_to_local(path),
        dtype=getattr(torch, dtype),
        attn_implementation="sdpa",
        trust_remote_code=trust_remote_code,
    )
    return model.to(device).eval()  # pyright: ignore[reportArgumentType]


@ray.remote
class HiddenStateServer(ModelServer):
    """Holds the teacher; answers hidden states for token ids."""

    def __init__(self, path: str, dtype: str, device: str, trust_remote_code: bool) -> None:
        super().__init__()
        self.model = load_teacher(path, dtype, device, trust_remote_code=trust_remote_code)

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **_images: Any
    ) -> TokenOutput:
        """In verl's layout of `prompt_logprobs=0`: row t names the token after t, and its score is the state at t."""
        ids = normalize_token_ids(prompt_ids)
        async with self.turn:
            states = await asyncio.to_thread(read_states, self.model, ids)
        named = [[token] for token in [*ids[1:], 0]]
        return TokenOutput(
            token_ids=[0], stop_reason="completed", extra_fields={"prompt_ids": named, "prompt_logprobs": states}
        )


def trusts(engine_kwargs: Mapping[str, Any]) -> bool:
    """The setting trust_remote_code of the teacher: verl tells a server no more of its model than the path."""
    return bool(engine_kwargs.get(NAME, {}).get("trust_remote_code"))


class HiddenStateReplica(ModelReplica):
    """One server on one GPU of the teacher pool."""

    async def init_colocated(self, resource_pool: Any) -> None:
        if not self.is_teacher_model or self.world_size != 1:
            raise ConfigError(
                "inference.name=opd_hidden serves a teacher on one GPU; set distillation.teacher_models.teacher_model.inference."
                "tensor_model_parallel_size=1, and a name of vLLM or SGLang for other models."
            )
        await super().init_colocated(resource_pool)

    async def launch_servers(self) -> None:
        options: dict[str, Any] = {
            "name": f"opd_hidden_server_{self.replica_rank}{self.name_suffix}",
            "max_concurrency": self.max_concurrency,
            "num_cpus": 0,
        }
        device = get_device_name()
        if device != "cpu":
            options |= {"num_gpus": 1, "scheduling_strategy": self._bundle()}
        own_code = trusts(self.config.engine_kwargs)
        await self.keep(
            HiddenStateServer.options(**options).remote(self.model_config.path, self.config.dtype, device, own_code)  # pyright: ignore[reportAttributeAccessIssue]
        )

    def _bundle(self) -> PlacementGroupSchedulingStrategy:
        """This replica's GPU: the pool's bundles are counted through its nodes."""
        number, groups = self.resource_pool.start_bundle_index, self.resource_pool.get_placement_groups()
        for group in groups:
            if number < group.bundle_count:
                return PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=int(number))
            number -= group.bundle_count
        raise ConfigError("the teacher pool has fewer GPUs than teacher replicas; raise distillation.n_gpus_per_node.")

"""rollout.engine=vllm → the sampler of a run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from opd.config import Config
from opd.errors import ConfigError
from opd.models import context_length, vocabulary_rows
from opd.quantized import is_quantized
from opd.remote.keys import read_key
from opd.samplers.vllm import Engine, VllmSampler
from opd.samplers.vllm_checks import PROBES, Preflight
from opd.samplers.vllm_colocate import ColocatedVllm
from opd.samplers.vllm_http import VllmHttp
from opd.samplers.vllm_process import ServerProcess
from opd.samplers.vllm_server import VllmServer
from opd.samplers.vllm_weights import SyncFolder, adapter_rank
from opd.teachers.vocabulary import VocabularyMatch
from opd.trainer.load_models import LoadedModel, sampling_of
from opd.trainer.student import Student
from opd.types import Prompt

CPU_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Threads bound to cores would share them with the trainer's."""
ADAPTER_ENVIRONMENT = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}


def make_vllm_sampler(
    config: Config, loaded: LoadedModel, student: Student, vocabulary: VocabularyMatch, prompts: Sequence[Prompt]
) -> VllmSampler:
    """`prompts` are all that the run will sample for. Nothing is started before the first `load`."""
    rollout = config.rollout
    needed = max(len(loaded.renderer.prompt_ids(prompt)) for prompt in prompts) + rollout.max_new_tokens
    dtype = torch.bfloat16 if student.autocast_dtype is not None else loaded.model.dtype
    rank = None if is_quantized(student.model) else adapter_rank(student.model)
    engine = _engine(config, loaded, dtype, needed, rank)
    rows = vocabulary_rows(loaded.model)
    return VllmSampler(
        engine,
        loaded.renderer,
        sampling_of(rollout),
        eos_ids=loaded.eos,
        vocabulary=vocabulary,
        rows=rows,
        check=Preflight(
            prompts=[loaded.renderer.prompt_ids(prompt) for prompt in prompts[:PROBES]],
            needed_len=needed,
            pad_id=loaded.pad_id,
            rows=rows,
            autocast=student.autocast,
            half=dtype != torch.float32,
        ),
    )


def _engine(config: Config, loaded: LoadedModel, dtype: torch.dtype, needed: int, rank: int | None) -> Engine:
    """`rank` is that of adapters which a managed server applies itself."""
    rollout, section = config.rollout, config.rollout.vllm
    on_cpu = loaded.model.device.type == "cpu"
    sync = SyncFolder(section.sync_dir, loaded.files, untied=on_cpu and section.url is None)
    connect = partial(
        VllmHttp,
        key=read_key(section.api_key_env, "rollout.vllm.api_key_env"),
        timeout=section.timeout,
        connections=rollout.batch_size,
    )
    if section.url is not None:
        return VllmServer(connect, sync, url=section.url, concurrency=rollout.batch_size)
    length = section.max_model_len or needed
    context = context_length(loaded.model)
    if context is not None and length > context:
        raise ConfigError(
            f"rollout.vllm.max_model_len={length} is more than the student's context, {context} tokens; lower it, or drop it."
        )
    options: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": length,
        "max_num_seqs": rollout.batch_size,
        "gpu_memory_utilization": section.memory_share,
        "seed": config.seed,
        "trust_remote_code": config.student.trust_remote_code,
        "enforce_eager": on_cpu,  # there compilation takes minutes and gains little
    }
    if section.mode == "colocate":
        return ColocatedVllm(sync, {**options, "enable_sleep_mode": not on_cpu})
    arguments = ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--enable-scale-out"]
    lora = {} if rank is None else {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 2}
    for name, value in {**options, **lora, "served_model_name": "student"}.items():
        flag = f"--{name.replace('_', '-')}"
        arguments += ([flag] if value else []) if isinstance(value, bool) else [flag, str(value)]
    process = ServerProcess(
        python=section.python,
        arguments=[*arguments, *section.args],
        timeout=section.start_timeout,
        environment={**(CPU_ENVIRONMENT if on_cpu else {}), **({} if rank is None else ADAPTER_ENVIRONMENT)},
    )
    return VllmServer(connect, sync, process=process, concurrency=rollout.batch_size, adapters=rank is not None)

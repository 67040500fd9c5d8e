"""verl's FSDP engines, which ours are built on: on any device, and registered before verl's own in every release.

Where accelerator and host share one memory nothing is offloaded, and nothing is pinned.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar

from verl.utils import device
from verl.utils.device import get_device_name
from verl.workers.config import FSDPEngineConfig, HFModelConfig
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngine, FSDPEngineWithLMHead, FSDPEngineWithValueHead

from opd.integrations.verl.plugin.settings import TeacherModel

Engine = TypeVar("Engine", bound=type)


class OneMemory(FSDPEngine):
    """verl keeps the shards of a forward-only model, or of one with `offload_policy`, in pinned host memory.

    PyTorch pins memory for an accelerator alone. On a CPU the shards are where they belong already.
    """

    def _build_fsdp_module(self, module: Any) -> Any:
        if get_device_name() != "cpu":
            return super()._build_fsdp_module(module)
        asked = self.engine_config
        self.engine_config = dataclasses.replace(asked, forward_only=False, offload_policy=False)
        try:
            return super()._build_fsdp_module(module)
        finally:
            self.engine_config = asked


class LanguageModelEngine(OneMemory, FSDPEngineWithLMHead):
    """verl's engine of a language model, on any device."""


class ValueModelEngine(OneMemory, FSDPEngineWithValueHead):
    """verl's engine of a critic, on any device."""


def register_engine(model_type: str, backend: str) -> Callable[[Engine], Engine]:
    """Put an engine before verl's own of this model type and backend, on this machine's device.

    Since 0.9 by its vendor, which verl looks up first. In 0.8 by its place in the table: a second registration is ignored there,
    and no function takes one back.
    """
    name = device.get_device_name()
    if "vendor" in inspect.signature(EngineRegistry.register).parameters:
        return EngineRegistry.register(model_type=model_type, backend=backend, device=name, vendor=device.get_vendor())

    def put(engine: Engine) -> Engine:
        EngineRegistry._engines.setdefault(model_type, {}).setdefault(backend, {})[name] = engine
        return engine

    return put


def frozen_model_config(teacher: TeacherModel, student: HFModelConfig, attention: str | None) -> HFModelConfig:
    """verl's settings of a teacher's model, which reads what the student reads."""
    return HFModelConfig(
        path=teacher.model,
        trust_remote_code=teacher.trust_remote_code,
        override_config={} if attention is None else {"attn_implementation": attention},
        use_remove_padding=student.use_remove_padding,
        enable_gradient_checkpointing=False,
    )


def frozen_engine_config(actor: FSDPEngineConfig, precision: Any, **own: Any) -> FSDPEngineConfig:
    """verl's settings of the engine of a frozen model, sharded as the actor is."""
    return FSDPEngineConfig(
        model_dtype=precision,
        mixed_precision={**dict(actor.mixed_precision or {}), "param_dtype": precision},
        reshard_after_forward=True,  # no backward pass of the teacher would do it later
        fsdp_size=actor.fsdp_size,
        wrap_policy={k: v for k, v in deepcopy(dict(actor.wrap_policy)).items() if k == "min_num_params"},
        use_torch_compile=False,
        **own,
    )

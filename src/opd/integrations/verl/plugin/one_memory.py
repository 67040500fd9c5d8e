"""verl's FSDP engines where accelerator and host share one memory: nothing is offloaded there, and nothing is pinned."""

# pyright: reportMissingImports=false
from __future__ import annotations

import dataclasses
from typing import Any

from verl.utils.device import get_device_name
from verl.workers.engine.fsdp.transformer_impl import FSDPEngine, FSDPEngineWithLMHead, FSDPEngineWithValueHead


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

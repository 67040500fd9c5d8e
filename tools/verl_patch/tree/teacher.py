"""A frozen teacher beside the student, in the same worker: loaded and sharded by verl's FSDP engine, without an optimizer."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from opd.integrations.verl.plugin.base_engines import frozen_engine_config, frozen_model_config
from opd.integrations.verl.plugin.model_checks import common_vocabulary
from opd.integrations.verl.plugin.packed_reading import autocast, in_rows, packed, readable, reads_rows, takes_bounds
from opd.integrations.verl.plugin.settings import TeacherModel
from opd.teachers.vocabulary import embedding_rows

DEFAULT_PRECISION = "bf16"  # verl's, where fsdp_config.mixed_precision does not say


class Teacher(FSDPEngineWithLMHead):
    """Every worker holds a shard; a forward pass gathers one layer at a time."""

    def __init__(self, told: TeacherModel, student: Any) -> None:
        """`student` is the actor's engine, whose precision and sharding the teacher shares. Raises VocabularyError."""
        attention = student.model_config.override_config.get("attn_implementation")
        model = frozen_model_config(told, student.model_config, attention)
        self.vocabulary = common_vocabulary(student.model_config, model)
        for warning in self.vocabulary.warnings:
            print(f"on-policy distillation: warning: {warning}", flush=True)
        actor = student.engine_config
        precision = dict(actor.mixed_precision or {}).get("param_dtype", DEFAULT_PRECISION)
        # verl keeps the shards of a forward-only model in CPU memory
        config = frozen_engine_config(actor, precision, strategy=actor.strategy, forward_only=told.offload)
        super().__init__(model, config, None, None)
        module = self._build_module().requires_grad_(False)
        self.rows = embedding_rows(module)
        self.pass_packed_cu_seqlens = takes_bounds(module, student)
        self.module: Any = self._build_fsdp_module(module).eval()
        self.reads_rows = reads_rows(self, "teacher", student.model_config.processor)

    @torch.no_grad()
    def logits(self, micro_batch: Any, model_inputs: Mapping[str, Any]) -> Tensor:
        """[tokens, vocab] at every token of the micro-batch, padding left out; `model_inputs` are what the student reads."""
        if self.reads_rows and packed(micro_batch):
            model_inputs, _ = self.prepare_model_inputs(micro_batch=in_rows(micro_batch))
        model_inputs = readable(self, model_inputs)
        with autocast(self):
            logits = self.module(**model_inputs, use_cache=False).logits
        if isinstance(self.module, FSDPModule):
            self.module.reshard()  # FSDP2 keeps the root gathered for a backward pass, which never comes
        mask = model_inputs.get("attention_mask")
        return logits.squeeze(0) if mask is None else logits[mask.bool()]

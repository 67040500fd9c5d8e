"""A teacher whose server sends hidden states: its output layer alone is in the actor's workers, and every divergence is exact.

The states travel where verl's servers put log-probs, [tokens, hidden] of each sequence; the server is `hidden_server`.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.hub import cached_file
from verl.utils.device import get_device_id
from verl.utils.fs import copy_to_local

from opd.errors import ModelError, NonFiniteError
from opd.integrations.verl.plugin.alignment import ResponseTokens
from opd.integrations.verl.plugin.head import output_layer
from opd.integrations.verl.plugin.settings import Settings
from opd.integrations.verl.plugin.teachers.base import TargetSlice
from opd.integrations.verl.plugin.teachers.served_logprobs import refuse_other_tokens, sent, vocabulary_of
from opd.types import Head, HiddenTarget

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


class ServedHiddenStates:
    """Holds the teacher's output layer: one matrix, whole on every worker."""

    def __init__(self, settings: Settings, engine: Any) -> None:
        (self.teacher,) = settings.all_teachers.values()
        self.vocabulary = vocabulary_of(self.teacher, engine)
        self.head = load_head(copy_to_local(self.teacher.model), trust_remote_code=self.teacher.trust_remote_code)
        self.rows = self.head.weight.shape[0]

    def prepare(
        self, _inputs: Mapping[str, Any], micro_batch: Any, tokens: ResponseTokens
    ) -> AbstractContextManager[Sequence[TargetSlice]]:
        """The target of the response tokens. Raises an OpdError for states that no teacher gives."""
        name = self.teacher.model
        ids, states = sent(micro_batch, tokens)
        refuse_other_tokens(ids, tokens, name)
        width = self.head.weight.shape[1]
        if states.shape[-1] != width:
            raise ModelError(
                f"teacher '{name}' sent {states.shape[-1]} numbers per token, and its output layer takes {width}; let "
                "distillation.teacher_models.teacher_model.inference.name be what +opd=hidden sets."
            )
        bad = ~states.isfinite().all(-1)
        if bool(bad.any()):
            raise NonFiniteError(
                f"teacher '{name}' sent NaN or infinite hidden states at {int(bad.sum())} of {len(bad)} response tokens; no update was "
                "made. Look at distillation.teacher_models.teacher_model.inference.dtype."
            )
        head = _moved(self.head, states.dtype)
        if not self.teacher.offload:
            self.head = head
        return nullcontext([TargetSlice(target=HiddenTarget(hidden=states, head=head))])

    def offload(self) -> None:
        """Move the output layer to host memory; the next `prepare` copies it back."""
        bias = None if self.head.bias is None else self.head.bias.cpu()
        self.head = Head(weight=self.head.weight.cpu(), bias=bias)


def load_head(folder: str, *, trust_remote_code: bool = False) -> Head:
    """The output layer of a model whose other weights are not read. Raises ModelError where it cannot be found."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        layer, names = _named(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    weight = _read(folder, names["weight"])
    return Head(weight=weight, bias=None if layer.bias is None else _read(folder, names["bias"]))


def _named(model: nn.Module) -> tuple[nn.Linear, dict[str, list[str]]]:
    """The output layer, and under which names of the state dict its tensors stand; tied embeddings have several."""
    layer = output_layer(model, "teacher")
    everything = list(model.named_parameters(remove_duplicate=False))
    return layer, {
        which: [name for name, parameter in everything if parameter is held]
        for which, held in (("weight", layer.weight), ("bias", layer.bias))
    }


def _read(folder: str, names: Sequence[str]) -> Tensor:
    index = cached_file(folder, INDEX, _raise_exceptions_for_missing_entries=False)
    files: Mapping[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"] if index else {}
    for name in names:
        file = cached_file(folder, files.get(name, WEIGHTS), _raise_exceptions_for_missing_entries=False)
        if file is None:
            continue
        with safe_open(file, framework="pt") as weights:
            if name in weights.keys():  # noqa: SIM118  # no mapping
                return weights.get_tensor(name)
    raise ModelError(
        f"The output layer of teacher '{folder}' was not found: its safetensors hold no {' or '.join(names)}. Save it with transformers' "
        "save_pretrained, or use +opd=default, where the whole teacher is loaded."
    )


def _moved(head: Head, dtype: torch.dtype) -> Head:
    device = get_device_id()
    return Head(
        weight=head.weight.to(device, dtype), bias=None if head.bias is None else head.bias.to(device, torch.float32)
    )

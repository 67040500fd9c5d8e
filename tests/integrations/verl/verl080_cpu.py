"""verl 0.8 on a CPU, for tests: `VERL_USE_EXTERNAL_MODULES=verl080_cpu` with this folder on PYTHONPATH.

verl 0.8 has no platforms. Without an accelerator it takes torch.cpu for one, asks it for names of torch.cuda, asks torch for a
process group 'cpu:gloo,cpu:nccl', and takes the padding off batches with flash-attn. In other releases this module does nothing.
"""

from __future__ import annotations

import importlib.machinery
import operator
import os
import sys
import types
from importlib.metadata import version
from typing import Any

import torch


def lend_names() -> None:
    """What verl calls on its device module and torch.cpu does not have: there is nothing to free and nothing to count."""

    def nothing(*_: Any, **__: Any) -> int:
        return 0

    names = ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "memory_allocated", "memory_reserved")
    for name in (*names, "max_memory_allocated", "max_memory_reserved", "set_device"):
        setattr(torch.cpu, name, nothing)
    page = os.sysconf("SC_PAGE_SIZE")
    torch.cpu.mem_get_info = lambda *_: (page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES"))
    torch.cpu.get_device_name = lambda *_: "cpu"
    torch.cpu.get_rng_state = lambda *_: torch.get_rng_state()
    torch.cpu.set_rng_state = lambda state, *_: torch.set_rng_state(state)


def name_the_cpu_once() -> None:
    """torch refuses a backend for the CPU twice; gloo is the one meant."""
    made = torch.distributed.init_process_group

    def init_process_group(backend: Any = None, *args: Any, **kwargs: Any) -> None:
        made("cpu:gloo" if backend == "cpu:gloo,cpu:nccl" else backend, *args, **kwargs)

    torch.distributed.init_process_group = init_process_group


def take_padding_off() -> None:
    """flash_attn.bert_padding, of which verl needs the functions that transformers has too."""
    from transformers.modeling_flash_attention_utils import _pad_input, _unpad_input

    package, padding = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.bert_padding")
    for module in (package, padding):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    padding.pad_input, padding.unpad_input = _pad_input, _unpad_input
    padding.index_first_axis, padding.rearrange = operator.getitem, None
    package.bert_padding = padding
    sys.modules |= {"flash_attn": package, "flash_attn.bert_padding": padding}


if version("verl").startswith("0.8."):
    lend_names()
    name_the_cpu_once()
    take_padding_off()

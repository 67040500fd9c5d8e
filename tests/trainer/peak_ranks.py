"""Run as a program: updates of a student whose weights are divided over four ranks, and the most memory that each of them has had.

usage: peak_ranks.py FOLDER
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fsdp2_cases import import_all
from rank_cases import as_rank, in_forks, make_school, recipe
from torch import nn

from opd.ranks import Ranks
from opd.testing import digit_tokenizer, save_model, tiny_causal_lm
from opd.trainer import division
from opd.trainer.from_config import Given, RunComponents
from opd.trainer.loop import take_step

torch.set_num_threads(1)
WORLD, UPDATES = 4, 2
SIZES: dict[str, Any] = {"layers": 48, "hidden": 512, "heads": 8, "kv_heads": 4, "max_positions": 64}
"""113 million weights, of which a layer is a small part, as in usual models."""


def memory(name: str) -> int:
    """Bytes that /proc says of this process: VmRSS, or VmHWM, the most since it was last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(name)


def reset_peak() -> None:
    """What was freed goes back to the system first."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def steps(folder: Path, student: str, ranks: Ranks) -> tuple[RunComponents, int]:
    """A run of some updates, and the most memory of those after the first, which makes the optimizer's state."""
    values: dict[str, object] = {
        "student__model": str(folder / student),
        "train__parallel": "fsdp2",
        "train__steps": UPDATES + 1,
        "train__prompts_per_step": WORLD,
        "train__samples_per_prompt": 1,
        "rollout__max_new_tokens": 2,
        "guard__canary__action": "off",
    }
    parts = RunComponents(recipe(folder, values), Given(ranks=ranks))
    parts.draws.load(parts.student)
    for step in range(UPDATES):
        if step == 1:
            reset_peak()
        take_step(parts, step)
        parts.draws.load(parts.student)
    return parts, memory("VmHWM")


def peak(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Beyond what the program itself needs, which a small student shows first."""
    division.ROOM = 0.0  # otherwise whole weights are gathered while rollouts are drawn
    steps(folder, "student", ranks)
    gc.collect()
    reset_peak()
    before = memory("VmRSS")
    parts, most = steps(folder, "large", ranks)
    model = parts.student.model
    layers = [size_of(layer) for layer in division.decoder_layers(model)]
    sizes = {"whole": size_of(model), "layer": max(layers), "activations": activations(parts)}
    return {"ranks": ranks.gather({"peak": most - before, **sizes})}


def activations(parts: RunComponents) -> int:
    """Bytes that one more update keeps for its backward pass; of the gathered weights, which it keeps too, a layer counts already."""
    weights = {p.shape for p in parts.student.model.parameters() if p.ndim == 2}
    weights |= {shape[::-1] for shape in weights}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape not in weights:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        take_step(parts, UPDATES)
    return sum(kept.values())


def size_of(module: nn.Module) -> int:
    """Bytes of its weights, undivided."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


if __name__ == "__main__":
    school = Path(sys.argv[1])
    make_school(school)
    tokenizer = digit_tokenizer()
    save_model(tiny_causal_lm(tokenizer, **SIZES), tokenizer, school / "large")
    import_all()
    assert in_forks(WORLD, school / "peak.pt", partial(as_rank, school, cases={}, also=peak))
    print(json.dumps(torch.load(school / "peak.pt", weights_only=False)["ranks"]))

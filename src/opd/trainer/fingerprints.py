"""Hashes of what a run started from, so that a resumed run cannot silently go on with other prompts or other models."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from opd.errors import RunFolderError
from opd.types import Prompt

SAMPLED_ENTRIES = 256  # per tensor: training changes every one of them, and reading all of a large model takes minutes

SampledWeights = Mapping[str, tuple[tuple[int, ...], torch.Tensor]]
"""Shape and some entries of every parameter, by name."""


def prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    """A hash of the prompts in order."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        digest.update(repr((prompt.text, prompt.messages, prompt.answer, prompt.response, prompt.teacher)).encode())
    return digest.hexdigest()


@torch.no_grad()
def sampled_weights(model: PreTrainedModel) -> SampledWeights:
    """Shape of every parameter by name, and evenly spaced entries of it, in its own dtype on the CPU."""
    sampled = {}
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // SAMPLED_ENTRIES)
        sampled[name] = tuple(parameter.shape), flat[::step].cpu().clone()
    return sampled


def weights_fingerprint(model: PreTrainedModel) -> str:
    """A hash of names, shapes and evenly spaced entries of all parameters."""
    return fingerprint_of(sampled_weights(model))


def fingerprint_of(sampled: SampledWeights) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, (shape, entries) in sampled.items():
        digest.update(f"{name} {shape}".encode())
        digest.update(entries.double().numpy().tobytes())
    return digest.hexdigest()


def same_weights(sampled: SampledWeights, model: PreTrainedModel) -> bool:
    """Whether the model has these weights, as far as the coarser of the two dtypes can tell."""
    other = sampled_weights(model)
    if {name: shape for name, (shape, _) in sampled.items()} != {name: shape for name, (shape, _) in other.items()}:
        return False
    for name, (_, entries) in sampled.items():
        mine, theirs = entries, other[name][1]
        coarser = max(mine.dtype, theirs.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        if not torch.equal(mine.to(coarser), theirs.to(coarser)):
            return False
    return True


def check_same_inputs(saved: Mapping[str, str], now: Mapping[str, str], run_dir: str) -> None:
    """Raises RunFolderError naming what differs from the start of the run."""
    changed = [what for what, value in now.items() if saved.get(what) != value]
    if changed:
        raise RunFolderError(
            f"The {' and the '.join(changed)} differ from those that '{run_dir}' was started with, so --resume would not continue "
            "the same run. Restore them, or start a new --run_dir."
        )

"""Hashes of what a run started from, so that a resumed run cannot silently go on with other prompts or other models."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from opd.errors import RunFolderError
from opd.types import Prompt

SAMPLED_ENTRIES = 256  # per tensor: training changes every one of them, and reading all of a large model takes minutes


def prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    """A hash of the prompts in order."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        digest.update(repr((prompt.text, prompt.messages, prompt.answer, prompt.response, prompt.teacher)).encode())
    return digest.hexdigest()


@torch.no_grad()
def weights_fingerprint(model: PreTrainedModel) -> str:
    """A hash of names, shapes and evenly spaced entries of all parameters."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // SAMPLED_ENTRIES)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(flat[::step].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def check_same_inputs(saved: Mapping[str, str], now: Mapping[str, str], run_dir: str) -> None:
    """Raises RunFolderError naming what differs from the start of the run."""
    changed = [what for what, value in now.items() if saved.get(what) != value]
    if changed:
        raise RunFolderError(
            f"The {' and the '.join(changed)} differ from those that '{run_dir}' was started with, so --resume would not continue "
            "the same run. Restore them, or start a new --run_dir."
        )

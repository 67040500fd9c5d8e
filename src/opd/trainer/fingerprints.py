"""Hashes of what a run started from, so that a resumed run cannot silently go on with other prompts or other models.

They are of contents, so the same files under another path, on another device or read in another dtype are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from opd.config import Config
from opd.doctor.same_weights import SampledWeights
from opd.errors import RunFolderError
from opd.teachers.probe import same_fingerprint
from opd.trainer.resume import Change, effect_of
from opd.types import Prompt

CALL_STATE = ("padding", "truncation")  # of a fast tokenizer: what its last call asked for
HELD_OUT = "held-out prompts"
OF_A_TEXT = "log-probs of a fixed text"
"""Of a teacher behind a server, whose weights nobody sees. They differ by rounding, so they are compared as numbers."""


def prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    """A hash of the prompts in order."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        digest.update(repr((prompt.text, prompt.messages, prompt.answer, prompt.response, prompt.teacher)).encode())
        digest.update(repr(dict(prompt.template_arguments)).encode() if prompt.template_arguments else b"")
    return digest.hexdigest()


def weights_fingerprint(weights: SampledWeights) -> str:
    """A hash of names, shapes and entries rounded to bfloat16: that is the same number whether the weights were read in bfloat16 or in
    float32."""
    digest = hashlib.blake2b(digest_size=16)
    for name, (shape, entries) in weights.items():
        digest.update(f"{name} {shape}".encode())
        digest.update(entries.to(torch.bfloat16).double().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, eos: Sequence[int]) -> str:
    """A hash of the vocabulary, of how text is cut into it, of the chat template, and of the ids that end a response. A rendered
    prompt would not do: some templates write today's date."""
    digest = hashlib.blake2b(digest_size=16)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {"vocab": tokenizer.get_vocab()}
    own = {key: value for key, value in rules.items() if key not in CALL_STATE}
    digest.update(json.dumps(own, sort_keys=True).encode())
    digest.update(repr((tokenizer.chat_template, sorted(eos))).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def check_same_inputs(
    saved: Mapping[str, str], now: Mapping[str, str], config: Config, changes: Mapping[str, Change]
) -> None:
    """Raises RunFolderError naming what differs from the start of the run. What only one of the two has, because evaluation was
    switched on or off, is not compared; nor are held-out prompts that the recipe changes on purpose, or weights across float16."""
    measured = any(effect_of(key, config) == "evaluation" for key in changes)
    rounded = {key for key, values in changes.items() if key.endswith(".dtype") and "float16" in values}
    left_out = {HELD_OUT} if measured else set()
    left_out |= {
        what for what in now if any(what.startswith(_whose(key)) and what.endswith("weights") for key in rounded)
    }
    changed = [
        what for what, value in now.items() if what not in left_out and not _same(what, saved.get(what, value), value)
    ]
    moved = [key for key in changes if effect_of(key, config) == "inputs"]
    if moved and not saved.keys() & now.keys():
        raise RunFolderError(
            f"{', '.join(moved)} changed, and the checkpoint in '{config.run_dir}', of an older version of opd, does not say whether "
            "what is read is still the same. Resume with the recipe it was started with."
        )
    if changed:
        raise RunFolderError(
            f"The {' and the '.join(changed)} differ from those that '{config.run_dir}' was started with, so --resume would not continue "
            "the same run. Restore them, or start a new --run_dir."
        )


def _same(what: str, saved: str, now: str) -> bool:
    return same_fingerprint(saved, now) if what.endswith(OF_A_TEXT) else saved == now


def _whose(key: str) -> str:
    """`teachers.math.dtype` → the words that its fingerprints begin with."""
    parts = key.split(".")
    return f"teacher {parts[1]}'s" if parts[0] == "teachers" else f"{parts[0]}'s"

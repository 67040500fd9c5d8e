"""The served model: what it is, what it computes, and the hashes that tell it from any other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd import __version__
from opd.config import PromptsConfig, TeacherConfig
from opd.config.serving import ServeConfig
from opd.data.pack import layout_sequences
from opd.doctor.same_weights import sampled_weights
from opd.models import context_length, linear_head, response_hidden, response_logits, vocabulary_rows
from opd.teachers.hidden_wire import FORMAT, tensors_digest
from opd.teachers.vocabulary import embedding_rows
from opd.tokenizer import own_files
from opd.trainer.fingerprints import tokenizer_fingerprint, weights_fingerprint
from opd.trainer.load_models import LoadedModel, load_model, saved_files
from opd.types import Head

NOT_A_PRODUCT = (
    "{kind} does more than a matrix product after its last hidden state (a soft-cap or a scale), so hidden states alone do not give "
    "its logits; ask /v1/score for its top-k log-probs."
)


@dataclass(frozen=True, kw_only=True)
class FrozenModel:
    """A model in evaluation mode, its output layer, and its tokenizer's files."""

    name: str
    model: PreTrainedModel
    head: Head | None
    """None where logits are more than a product with the output layer."""
    eos: tuple[int, ...]
    chat_template: str | None
    tokens: int
    """Ids below this may be a token; rows of the output layer beyond are padding."""
    weights_fingerprint: str
    tokenizer_fingerprint: str
    tokenizer_files: Mapping[str, bytes]
    pad_id: int

    @cached_property
    def rows(self) -> int:
        """Ids that it can read."""
        return embedding_rows(self.model)

    @cached_property
    def head_rows(self) -> int:
        """Rows of the output layer, padding included."""
        return vocabulary_rows(self.model)

    @property
    def context(self) -> int | None:
        return context_length(self.model)

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @cached_property
    def head_tensors(self) -> dict[str, Tensor]:
        """The output layer by the names that it travels under."""
        assert self.head is not None
        parts = {"weight": self.head.weight, "bias": self.head.bias}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    @cached_property
    def head_fingerprint(self) -> str | None:
        return None if self.head is None else tensors_digest(self.head_tensors)

    @cached_property
    def identity(self) -> str:
        """A hash of all that decides an answer. Every answer carries it, and servers of one pool share it."""
        parts = (FORMAT, self.weights_fingerprint, self.tokenizer_fingerprint, self.head_fingerprint, self.dtype)
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def description(self, limits: ServeConfig) -> dict[str, Any]:
        """The answer to GET /v1/model."""
        config = self.model.config.get_text_config()
        reason = None if self.head is not None else NOT_A_PRODUCT.format(kind=type(self.model).__name__)
        template = None if self.chat_template is None else hashlib.sha256(_bytes(self.chat_template)).hexdigest()
        return {
            "format": FORMAT,
            "opd": __version__,
            "name": self.name,
            "kind": type(self.model).__name__,
            "dtype": self.dtype,
            "hidden_size": config.hidden_size if self.head is None else self.head.weight.shape[1],
            "rows": self.rows,
            "head_rows": self.head_rows,
            "valid_rows": min(self.tokens, self.head_rows),
            "context": self.context,
            "hidden": self.head is not None,
            "hidden_reason": reason,
            "identity": self.identity,
            "fingerprints": {
                "weights": self.weights_fingerprint,
                "tokenizer": self.tokenizer_fingerprint,
                "head": self.head_fingerprint,
            },
            "eos_ids": list(self.eos),
            "chat_template": template,
            "limits": {
                "row_tokens": min(limits.max_tokens, self.context or limits.max_tokens),
                "rows": limits.max_request_rows,
                "tokens": limits.max_request_tokens,
                "body_bytes": limits.max_body_mb << 20,
                "batch_tokens": limits.max_tokens,
            },
        }

    @torch.no_grad()
    def outputs(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[Tensor]:
        """Per row, the hidden states that predict its response tokens, as a local teacher has them; logits where those are not enough."""
        sequences = layout_sequences(
            prompts, responses, layout="right_padded", pad_id=self.pad_id, device=self.model.device
        )
        if self.head is None:
            flat = response_logits(self.model, sequences)
        else:
            flat = response_hidden(self.model, sequences).to(self.head.weight.dtype)
        return list(flat.split([len(response) for response in responses]))


def freeze(config: ServeConfig) -> FrozenModel:
    """Load the model as a recipe's teacher is loaded. Raises ModelError."""
    options = {"dtype", "device", "revision", "attn_implementation", "trust_remote_code", "load_options"}
    section = TeacherConfig(model=config.model, **{name: getattr(config, name) for name in options})
    loaded = load_model(section, "teacher", PromptsConfig(path="-"), device=config.device)
    code = config.trust_remote_code
    files = own_files(config.model, loaded.tokenizer, revision=config.revision, code=code)
    return frozen(config.model, loaded, files)


def frozen(name: str, loaded: LoadedModel, files: Mapping[str, bytes] | None = None) -> FrozenModel:
    """A model in memory, frozen. Without tokenizer files among `files`, the tokenizer is written out."""
    tokenizer: Any = loaded.tokenizer
    model = loaded.model.requires_grad_(False).eval()
    files = files or {}
    has_tokenizer = any(path.startswith(("tokenizer", "vocab")) for path in files)
    return FrozenModel(
        name=name,
        model=model,
        head=linear_head(model),
        eos=loaded.eos,
        chat_template=None if tokenizer.chat_template is None else json.dumps(tokenizer.chat_template),
        tokens=max(tokenizer.get_vocab().values()) + 1,
        weights_fingerprint=weights_fingerprint(sampled_weights(model)),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer, loaded.eos),
        tokenizer_files=files if has_tokenizer else saved_files(tokenizer),
        pad_id=loaded.pad_id,
    )


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")

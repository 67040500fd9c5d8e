"""How long the phases of a step would take at the machine's limits, from the model's sizes and the lengths of the rollouts.

Only work that the method cannot do without is counted: no padding, no token after an end, one reading of the weights per token that
is decoded. Products count two operations per multiplication; attention counts whole squares, as PyTorch's own counter does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLOAT32 = 4  # bytes
ADAMW_ARRAYS = 7  # weight, gradient and two moments are read; weight and moments are written

Lengths = Sequence[tuple[int, int]]
"""Tokens of the prompt and of the response, of every rollout of a step."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder with gated feed-forward layers (Llama, Qwen3)."""

    layers: int
    hidden: int
    inner: int
    """Width of the feed-forward layers."""
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @staticmethod
    def of_config(config: Mapping[str, Any]) -> Shape:
        heads = config["num_attention_heads"]
        return Shape(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            inner=config["intermediate_size"],
            heads=heads,
            kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocabulary=config["vocab_size"],
        )

    @staticmethod
    def of_folder(folder: Path) -> Shape:
        """Of a model on disk."""
        return Shape.of_config(json.loads((folder / "config.json").read_text("utf-8")))

    @property
    def layer_weights(self) -> int:
        """Entries of one layer's matrices."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.inner

    @property
    def weights(self) -> int:
        """Entries of all layers' matrices and of the output layer, which is the embedding too."""
        return self.layers * self.layer_weights + self.hidden * self.vocabulary

    def body(self, tokens: int, keys: int) -> float:
        """Floating-point operations of the layers for `tokens` positions that see `keys` positions each."""
        products = 2 * tokens * self.layer_weights
        attention = 4 * tokens * keys * self.heads * self.head_dim
        return float(self.layers * (products + attention))

    def head(self, tokens: int) -> float:
        """Floating-point operations of the output layer."""
        return 2.0 * tokens * self.hidden * self.vocabulary


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one step has to do; operations are floating-point ones."""

    prefill: float
    decode: float
    decode_bytes: float
    """Weights, once for every token of the longest response but the first."""
    teacher: float
    """The layers; the teacher's output layer runs in the update, in both trainers."""
    update: float
    update_bytes: float
    """AdamW's arrays, read and written once."""


def work(shape: Shape, lengths: Lengths) -> Work:
    """Of one step. The last token of a response is not fed, and every token of it is predicted."""
    whole = [(prompt + response - 1) for prompt, response in lengths]
    responses = sum(response for _, response in lengths)
    bodies = sum(shape.body(n, n) for n in whole)
    decode = sum(
        shape.body(1, keys) + shape.head(1)
        for prompt, response in lengths
        for keys in range(prompt + 1, prompt + response)
    )
    longest = max(response for _, response in lengths)
    return Work(
        prefill=sum(shape.body(prompt, prompt) + shape.head(1) for prompt, _ in lengths),
        decode=decode,
        decode_bytes=float((longest - 1) * shape.weights * FLOAT32),
        teacher=bodies,
        update=3 * (bodies + shape.head(responses)) + shape.head(responses),
        update_bytes=float(ADAMW_ARRAYS * shape.weights * FLOAT32),
    )


def limits(work: Mapping[str, float], matrix_rates: Mapping[str, float], read_rate: float) -> dict[str, float]:
    """Seconds of each phase at its own of `matrix_rates`, operations per second, and at `read_rate` bytes per second. `work` has the
    fields of Work by name."""
    rollout, teacher, update = (matrix_rates[phase] for phase in ("rollout", "teacher", "update"))
    decode = max(work["decode"] / rollout, work["decode_bytes"] / read_rate)
    return {
        "rollout": work["prefill"] / rollout + decode,
        "teacher": work["teacher"] / teacher,
        "update": work["update"] / update + work["update_bytes"] / read_rate,
    }

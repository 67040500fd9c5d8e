"""Test equipment: tokenizers and models built in milliseconds, and inputs with known answers.

Shipped with the library, so that a project with its own loss, teacher or reward can test it the way this one does.
"""

from __future__ import annotations

from opd.testing.factories import (
    assert_close_to_reference,
    random_logits,
    random_rollout,
    random_target,
    target_from_logits,
)
from opd.testing.models import save_model, tiny_causal_lm
from opd.testing.tokenizers import CHAT_TEMPLATE, byte_tokenizer, digit_tokenizer

__all__ = [
    "CHAT_TEMPLATE",
    "assert_close_to_reference",
    "byte_tokenizer",
    "digit_tokenizer",
    "random_logits",
    "random_rollout",
    "random_target",
    "save_model",
    "target_from_logits",
    "tiny_causal_lm",
]

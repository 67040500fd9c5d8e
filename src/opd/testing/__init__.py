"""What tests are made of: tokenizers and models built in milliseconds, and inputs whose answers are known.

Shipped with the library, so that a project with its own loss, teacher or reward can test it the way this one does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "CHAT_TEMPLATE": "opd.testing.tokenizers",
    "assert_close_to_reference": "opd.testing.factories",
    "byte_tokenizer": "opd.testing.tokenizers",
    "digit_tokenizer": "opd.testing.tokenizers",
    "random_logits": "opd.testing.factories",
    "random_rollout": "opd.testing.factories",
    "random_target": "opd.testing.factories",
    "save_model": "opd.testing.models",
    "target_from_logits": "opd.testing.factories",
    "tiny_causal_lm": "opd.testing.models",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

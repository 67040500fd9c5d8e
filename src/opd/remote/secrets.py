"""Words of a command or of a recipe without the keys and passwords that may be among them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "***"
_OPTION = re.compile(r"-{1,2}[\w.-]*(?:api[-_]?key|token|password|passwd|secret|authorization)", re.IGNORECASE)
"""An option whose value is a secret; none of opd's own keys ends so."""
_KNOWN = re.compile(
    r"\bhf_[A-Za-z0-9]{8,}|\bsk-[A-Za-z0-9_-]{8,}|(?<=://)[^/\s@]+(?=@)|(?<=Bearer )[^\s'\"]+"
    r"|(?<=[?&](?:key)=)[^&\s'\"]+|(?<=[?&](?:token)=)[^&\s'\"]+|(?<=[?&](?:api_key)=)[^&\s'\"]+"
)
"""Keys of Hugging Face and of OpenAI-like servers, and secrets in addresses and headers."""


def without_secrets(words: Sequence[str]) -> list[str]:
    """The words of a command line; the value of an option such as --api-key, and what looks like a key, becomes ***."""
    shown: list[str] = []
    hide_next = False
    for word in words:
        name, equals, value = word.partition("=")
        if hide_next and not word.startswith("--"):
            shown.append(HIDDEN)
        elif equals and value and _OPTION.fullmatch(name):
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(_KNOWN.sub(HIDDEN, word))
        hide_next = _OPTION.fullmatch(word) is not None
    return shown


def settings_without_secrets(value: Any) -> Any:
    """Nested settings, with every text and every list of words as `without_secrets` shows it."""
    if isinstance(value, Mapping):
        return {key: settings_without_secrets(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        if all(isinstance(item, str) for item in value):
            return without_secrets(list(value))
        return [settings_without_secrets(item) for item in value]
    return _KNOWN.sub(HIDDEN, value) if isinstance(value, str) else value

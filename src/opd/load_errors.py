"""Exceptions of transformers while it loads a model or a tokenizer, and their words for a user. Imports no torch."""

from __future__ import annotations

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

UNREADABLE = (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError, StrictDataclassError)
"""Exceptions of transformers for a folder that is incomplete, damaged or of another kind."""


def load_failure(role: str, what: str, name: str, error: Exception) -> str:
    """The error message for an exception of transformers while loading."""
    if "trust_remote_code" in str(error):
        return (
            f"The {role} '{name}' comes with Python code of its own, which opd does not run unasked. Read that code; if you trust it, set "
            f"{role}.trust_remote_code=true."
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
    reason = " ".join(lines)[:300] if isinstance(error, OSError) else f"{type(error).__name__}: {' '.join(lines)[:300]}"
    return (
        f"The {role}'s {what} '{name}' cannot be loaded: {reason.rstrip('.')}. "
        f"Give {role}.model a folder that holds config.json, weights and tokenizer, or a hub name this machine can reach."
    )

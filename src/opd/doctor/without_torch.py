"""transformers without torch: its tokenizers and configs need none, and torch takes seconds to import."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _set_for_now(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = before or value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


@contextmanager
def transformers_without_torch() -> Iterator[bool]:
    """transformers is imported as if torch were not installed; False where torch is there already, and nothing is changed.

    transformers remembers it: this process can load tokenizers and configs from then on, and no model.
    """
    if "torch" in sys.modules:
        yield False
        return
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]  # Python's own way of saying that it is not there
    try:
        with _set_for_now("TRANSFORMERS_VERBOSITY", "error"):  # or it says that it found no torch
            import transformers  # noqa: F401
        yield True
    finally:
        del sys.modules["torch"]

"""Every error a user can cause. Each message says what, why, and what to do; the command line prints it without a traceback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches


class OpdError(ValueError):
    """Base of all user-facing errors."""


class ConfigError(OpdError):
    """A recipe or a command-line value that cannot be used."""


def require(ok: bool, what: str) -> None:
    """Raise ConfigError unless `ok`."""
    if not ok:
        raise ConfigError(what)


def did_you_mean(word: str, choices: Sequence[str], also_called: Mapping[str, Sequence[str]] | None = None) -> str:
    """' Did you mean …?' for a word that is not among the choices, or nothing: choices that go by that name elsewhere (`also_called`),
    that have it as one of their parts, or that it misspells."""
    plain = word.strip().lower().replace("-", "_").replace(" ", "_")
    meant = [choice for choice in (also_called or {}).get(plain, ()) if choice in choices]
    meant = meant or [choice for choice in choices if choice == plain]
    meant = meant or [choice for choice in choices if plain and f"_{plain}_" in f"_{choice}_"]
    meant = meant or get_close_matches(plain, choices, n=1)
    return f" Did you mean {' or '.join(repr(choice) for choice in meant)}?" if meant else ""


class ObjectiveError(OpdError):
    """A loss that is wrong, undefined, or that this teacher cannot feed."""


class VocabularyError(OpdError):
    """Student and teacher do not read the same token ids."""


class DataError(OpdError):
    """Prompts that are missing, empty, malformed or too long."""


class ModelError(OpdError):
    """A model or tokenizer that cannot be loaded or driven."""


class RunFolderError(OpdError):
    """A run folder that is taken, unwritable, full, or does not match the recipe."""


class NonFiniteError(OpdError):
    """A NaN or infinite loss or gradient; the weights were not changed."""


class OutOfMemoryError(OpdError):
    """A phase of the step did not fit in memory."""


class MissingDependencyError(OpdError, ImportError):
    """An optional extra that the recipe asks for is not installed."""

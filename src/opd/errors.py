"""Every error a user can cause. Each message says what, why, and what to do; the command line prints it without a traceback."""

from __future__ import annotations


class OpdError(ValueError):
    """Base of all user-facing errors."""


class ConfigError(OpdError):
    """A recipe or a command-line value that cannot be used."""


def require(ok: bool, what: str) -> None:
    """Raise ConfigError unless `ok`."""
    if not ok:
        raise ConfigError(what)


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

"""Errors that a user can cause. A message says what, why, and what to do; the command line prints it without a traceback."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that move a terminal's cursor, set its title, reorder its text, or cannot be written at all."""


def printable(text: str) -> str:
    """The text with UNPRINTABLE characters as escapes: quoted data must not control the terminal."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class OpdError(ValueError):
    """Base of all user-facing errors."""

    exit_code = 1
    """Of the command that it ends."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(OpdError):
    """A recipe or a command-line value that cannot be used."""


def require(ok: bool, what: str) -> None:
    """Raise ConfigError unless `ok`."""
    if not ok:
        raise ConfigError(what)


ALSO_CALLED: dict[str, tuple[str, ...]] = {
    "kl": ("reverse_kl", "forward_kl"),
    "kld": ("reverse_kl", "forward_kl"),
    "kl_div": ("reverse_kl", "forward_kl"),
    "rkl": ("reverse_kl",),
    "fkl": ("forward_kl",),
    "js": ("generalized_jsd",),
    "jensen_shannon": ("generalized_jsd",),
    "gkd": ("generalized_jsd", "skew_reverse_kl"),
    "skl": ("skew_forward_kl",),
    "srkl": ("skew_reverse_kl",),
    "tv": ("total_variation",),
    "tvd": ("total_variation",),
    "symmetric_kl": ("forward_reverse_kl",),
    "jeffreys": ("forward_reverse_kl",),
    "ab": ("alpha_beta_divergence",),
    "topk": ("teacher_top_k", "student_top_k"),
    "fp32": ("float32",),
    "fp16": ("float16",),
    "half": ("float16",),
    "adam": ("adamw",),
}
"""Choices of a recipe by their names in papers and other programs (SKL and SRKL: DistiLLM, arXiv 2402.03898)."""


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """' Did you mean …?' with the choices that a wrong word may mean, or ''.

    These are choices with that name elsewhere, else with that word as a part, else the one that it misspells.
    """
    plain = word.strip().lower().replace("-", "_").replace(" ", "_")
    meant = [choice for choice in ALSO_CALLED.get(plain, ()) if choice in choices]
    meant = meant or [choice for choice in choices if choice == plain]
    meant = meant or [choice for choice in choices if plain and f"_{plain}_" in f"_{choice}_"]
    meant = meant or get_close_matches(plain, choices, n=1)
    return f" Did you mean {' or '.join(repr(choice) for choice in meant)}?" if meant else ""


class ObjectiveError(OpdError):
    """A loss that is wrong, undefined, or needs more than this teacher supplies."""


class VocabularyError(OpdError):
    """Token ids with different meanings for student and teacher."""


class DataError(OpdError):
    """Prompts that are missing, empty, malformed or too long."""


class CacheError(DataError):
    """Kept scores or rollouts that are damaged, missing, or of something else."""


class ModelError(OpdError):
    """A model or tokenizer that cannot be loaded or used."""


class RunFolderError(OpdError):
    """A run folder that is taken, unwritable, full, or does not match the recipe."""


class NonFiniteError(OpdError):
    """A NaN or infinite loss or gradient; the weights are unchanged."""


UNDRAWABLE = (
    "A model's next-token probabilities are NaN or infinite{where}, so nothing can be sampled from it. The weights on disk were not changed. "
    "Lower optimizer.lr and start again, or use float32 or bfloat16 in place of float16."
)


class UndrawableError(NonFiniteError):
    """Next-token probabilities that are NaN or infinite, so that nothing can be drawn from them."""


class OutOfMemoryError(OpdError):
    """A phase of the step did not fit in memory."""


class ServerError(OpdError):
    """A server that is not there, does not answer in time, or gives answers that cannot be used."""


class ServerChangedError(ServerError):
    """A server holds another model than at the start of the run."""


class RankError(OpdError):
    """A process of several that train together has ended."""


class MissingDependencyError(OpdError, ImportError):
    """An optional dependency that the recipe needs and that is not installed."""

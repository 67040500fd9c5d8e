"""`opd verl smoke`: runs a user's own verl config for a few steps on this machine's CPU."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

from opd.errors import ConfigError, MissingDependencyError

USAGE = "opd verl smoke [--steps N] [--timeout SECONDS] [--try] <the words after python -m verl.trainer.main_ppo>"
HELP = """
Runs your config for a few steps on the CPU, with small random models in place of yours, so that mistakes show before a
cluster is booked. Tokenizers, model classes, data and rewards are yours if they are on this machine. Prints each replacement,
then each step's metrics, then ok or the first error.

--steps N          training steps (default 2)
--timeout SECONDS  for the whole dry run (default 600)
--try              use a verl release whose internals differ from those that opd expects: opd.try_verl=true"""
INTERRUPTED = 130


def run(args: Sequence[str]) -> int:
    if args and args[0] == "patch":
        from opd.cli.verl_patch import run as patch

        return patch(args[1:])
    if "-h" in args or "--help" in args:
        print(f"usage: {USAGE}\n{HELP}\n\nopd verl patch --help: on-policy distillation inside verl's own tree.")
        return 0
    if not args or args[0] != "smoke":
        raise ConfigError(f"There are two commands here: {USAGE}; and opd verl patch, see opd verl patch --help")
    options, words = _split(args[1:])
    if not words:
        raise ConfigError(f"Give your verl overrides: {USAGE}")
    if importlib.util.find_spec("verl") is None:
        raise MissingDependencyError("verl is not installed in this environment; pip install 'opd[verl]'.")
    from opd.integrations.verl.dry_run.smoke import smoke

    before = signal.signal(signal.SIGTERM, _interrupt)  # ends the processes that it started
    try:
        smoke(words, **options)  # pyright: ignore[reportArgumentType]
    except KeyboardInterrupt:
        print("interrupted; everything that was started has been ended", file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


OPTIONS: dict[str, tuple[str, Callable[[str], float]]] = {"--steps": ("steps", int), "--timeout": ("limit", float)}


def _split(args: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """Options of `opd verl smoke`, and the words that go to verl."""
    options: dict[str, float] = {}
    words: list[str] = []
    rest = iter(args)
    for word in rest:
        if word == "--try":
            options["try_verl"] = True
            continue
        flag, equals, value = word.partition("=")
        if flag not in OPTIONS:
            words.append(word)
            continue
        name, kind = OPTIONS[flag]
        value = value if equals else next(rest, "")
        try:
            options[name] = kind(value)
        except ValueError:
            raise ConfigError(f"{flag} takes a number, not '{value}'; write {flag} 2, say.") from None
        if not 0 < options[name] < float("inf"):
            raise ConfigError(f"{flag}={value} must be above 0.")
    return options, words

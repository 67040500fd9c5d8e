"""`opd verl smoke`: runs a user's own verl config for a few steps on this machine's CPU."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from opd.errors import ConfigError, MissingDependencyError, OpdError

if TYPE_CHECKING:
    from opd.doctor.check import Check

USAGE = "opd verl smoke [--steps N] [--timeout SECONDS] [--try] [--no-doctor] [--json] <the words after python -m verl.trainer.main_ppo>"
HELP = """
Runs your config for a few steps on the CPU, with small random models in place of yours, so that mistakes show before a
cluster is booked. Tokenizers, model classes, data and rewards are yours if they are on this machine. The doctor's table comes first:
it looks at your own files, and says which. A red check ends it there. Then come each replacement, each step's metrics, and ok or the
first error.

--steps N          training steps (default 2)
--timeout SECONDS  for the whole dry run (default 600)
--no-doctor        leave the doctor's checks out
--json             print one JSON document, with the run as its last check; the rest goes to stderr
--try              use a verl release whose internals differ from those that opd expects: opd.try_verl=true

Exits with 0 when all is green or skipped and the run got through, with 1 when a check is yellow, and with 2 when one is red or the run
failed."""
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
    rest = [word for word in args[1:] if word not in ("--json", "--no-doctor")]
    options, words = _split(rest)
    if not words:
        raise ConfigError(f"Give your verl overrides: {USAGE}")
    if importlib.util.find_spec("verl") is None:
        raise MissingDependencyError("verl is not installed in this environment; pip install 'opd[verl]'.")
    checks = [] if "--no-doctor" in args else _doctor(words)
    before = signal.signal(signal.SIGTERM, _interrupt)  # ends the processes that it started
    try:
        return _smoke(words, options, checks, as_json="--json" in args)
    except KeyboardInterrupt:
        print("interrupted; everything that was started has been ended", file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


def _doctor(words: Sequence[str]) -> list[Check]:
    from transformers.utils.logging import disable_progress_bar

    from opd.cli.verl_doctor import examine_words

    disable_progress_bar()
    return examine_words(words)


def _smoke(words: Sequence[str], options: Mapping[str, float], checks: list[Check], *, as_json: bool) -> int:
    """Show the checks and run verl, unless one is red; the exit code."""
    from opd.doctor.check import EXIT_CODES, Check, exit_code, failed
    from opd.doctor.shown import as_json as document
    from opd.doctor.shown import show_table
    from opd.integrations.verl.dry_run.smoke import smoke

    if checks and not as_json:
        show_table(checks, sys.stdout)
        print(flush=True)
    stream = sys.stderr if as_json else sys.stdout
    try:
        if exit_code(checks) == EXIT_CODES["red"]:
            raise ConfigError(
                "verl was not started, because a check of the doctor is red. Mend it, or start all the same with --no-doctor."
            )
        folder = smoke(words, say=lambda text: print(text, file=stream, flush=True), **options)  # pyright: ignore[reportArgumentType]
    except OpdError as error:
        if as_json:
            print(document([*checks, failed("steps", error)], None))
            return EXIT_CODES["red"]
        error.exit_code = EXIT_CODES["red"]
        raise
    if as_json:
        seen = f"verl got through its steps; log and metrics are in {folder}."
        print(document([*checks, Check(name="steps", verdict="green", seen=seen)], None))
    return exit_code(checks)


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

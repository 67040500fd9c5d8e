"""`opd check`: all that can be said of a recipe without loading a weight, in two seconds of CPU time."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opd.errors import ConfigError, OpdError, printable

if TYPE_CHECKING:
    from opd.doctor.quick import Examined, Rendered

USAGE = "opd check RECIPE.yaml [--gpu-memory GIB[,GIB…]] [--section.key value …]"
GPU_MEMORY = "--gpu-memory"
HELP = f"""usage: {USAGE}

Checks a recipe before a weight is loaded: keys, files, columns, tokenizers, templates, lengths, sizes, memory. Shows two prompts as each model
reads them, special tokens included; what only one of two models reads stands in ⟦ ⟧.

Exits with 0 when all is green, with 1 when something is yellow (a run would start, and may not do what is meant), and with 2 when
something is red (a run would be refused). It takes the arguments of opd train, and starts nothing.

{GPU_MEMORY} 24,24 answers for a machine with two GPUs of 24 GiB, in place of those that are here."""
COLOURS = {"green": "\x1b[32m", "yellow": "\x1b[33m", "red": "\x1b[31m"}
PLAIN = "\x1b[0m"
GIB = 1 << 30


def run(args: Sequence[str]) -> int:
    if "-h" in args or "--help" in args:
        print(HELP)
        return 0
    from opd.config.recipe import check, words_of
    from opd.doctor.check import EXIT_CODES
    from opd.doctor.quick import examine

    try:
        words, gpus = _gpu_memory(args)
        recipe, overrides = _read(words)
        settings = check(words_of(recipe, overrides))
    except OpdError as error:
        error.exit_code = EXIT_CODES["red"]
        raise
    examined = examine(settings, gpus=gpus)
    show(examined)
    return EXIT_CODES[examined.verdict]


def show(examined: Examined) -> None:
    """Print the checks as lines of verdict, name and what was seen, then the prompts, then the worst verdict."""
    coloured = sys.stdout.isatty()
    for one in examined.checks:
        verdict = f"{one.verdict:<6}"
        verdict = f"{COLOURS[one.verdict]}{verdict}{PLAIN}" if coloured else verdict
        print(f"{verdict}  {one.name:<10}  {printable(one.seen)}")
    _show_prompts(examined.rendered)
    print(f"\n{examined.verdict}")


def _show_prompts(rendered: Sequence[Rendered]) -> None:
    from opd.reporting.progress import quoted

    alone = {one.prompt for one in rendered} - {one.prompt for one in rendered if one.role != "student"}
    for one in rendered:
        who = "every model" if one.prompt in alone else one.role
        print(f"\nprompt {one.prompt}, as {who} reads it:")
        for line in quoted("", one.text):
            print(printable(line))


def _gpu_memory(args: Sequence[str]) -> tuple[list[str], list[int] | None]:
    """The other arguments, and bytes of every GPU that is asked about; None is the GPUs of this machine."""
    words, given = list[str](), None
    rest = iter(args)
    for word in rest:
        name, equals, value = word.partition("=")
        if name == GPU_MEMORY:
            given = value if equals else next(rest, "")
        else:
            words.append(word)
    if given is None:
        return words, None
    try:
        sizes = [float(size) for size in given.split(",")]
    except ValueError:
        sizes = []
    if not sizes or not all(0 < size < math.inf for size in sizes):
        raise ConfigError(
            f"{GPU_MEMORY}={given!r} is not the memory of GPUs in GiB; write one number for each, e.g. {GPU_MEMORY} 24,24."
        )
    return words, [int(size * GIB) for size in sizes]


def _read(args: Sequence[str]) -> tuple[str | None, list[str]]:
    words = list(args)
    recipe = words.pop(0) if words and not words[0].startswith("--") else None
    if recipe is None and not words:
        raise ConfigError(f"Give a recipe: {USAGE}.")
    for word in ("--resume", "--overwrite"):
        if word in words:
            raise ConfigError(f"opd check starts nothing, so {word} has no meaning; drop it.")
    return recipe, words

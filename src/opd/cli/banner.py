"""The banner of `opd train`: what the recipe says, before torch is imported, and then what `opd check` finds in it."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from opd import __version__
from opd.config.recipe import to_dict
from opd.config.run import RunSettings
from opd.errors import ConfigError, printable

if TYPE_CHECKING:
    from opd.doctor.read_prompts import ReadPrompts

ESTIMATES = ("memory", "size")
"""Checks whose red is an estimate, or the want of one: it is shown, and refuses no run."""


def show_banner(settings: RunSettings) -> bool:
    """Print the banner, from a recipe that was read and checked; False where log.progress=off, and nothing is printed."""
    if settings.log.progress == "off":
        return False
    from opd.reporting.banner import banner, show

    show(banner(to_dict(settings), __version__), sys.stdout)
    return True


def show_checks(settings: RunSettings, ranks: int = 1) -> tuple[frozenset[str], ReadPrompts | None]:
    """Print what `opd check` finds of a run of so many ranks, a line for every yellow check; return these warnings, and the prompts, which are read once. Raises
    ConfigError with the words of the red ones: such a run would be refused later, or would go wrong."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig  # noqa: F401  # the run needs their seconds anyway

    import opd.tokenizer  # noqa: F401
    from opd.doctor.quick import examine
    from opd.reporting.banner import show

    began = time.process_time()
    examined = examine(settings, ranks=ranks)
    checks = examined.checks
    seconds = time.process_time() - began
    refused = [one.seen for one in checks if one.verdict == "red" and one.name not in ESTIMATES]
    if refused:
        raise ConfigError("\n".join(refused))
    doubted = [one.seen for one in checks if one.verdict in ("yellow", "red")]
    count = f"{len(doubted)} warning{'' if len(doubted) == 1 else 's'}" if doubted else "no warning"
    show(
        [("check", f"{len(checks)} findings, {count}; {seconds:.1f} s of CPU time; opd check shows them all")],
        sys.stdout,
    )
    for text in doubted:
        print(f"warning: {printable(text)}")
    sys.stdout.flush()
    return frozenset(doubted), examined.read

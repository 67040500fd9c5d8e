"""`opd doctor`: can this recipe work on this machine? `opd doctor verl` checks that the verl plugin is installed and loaded."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opd.errors import ConfigError, OpdError

if TYPE_CHECKING:
    from opd.doctor.check import Check

USAGE = "opd doctor [RECIPE.yaml] [--json] [--prompts N] [--section.key value …] | opd doctor verl [--json] [VERL OVERRIDES]"
HELP = """Looks for what makes a run fail silently, before it starts: the machine, the vocabulary, both models' prompts, the teacher's
scores, the ends of answers, the distance of the two models, the task's reward. Nothing is trained or written. Without a recipe it looks
at the machine alone.

--json        print one JSON document
--prompts N   training prompts that both models answer (32)

Exits with 0 when all checks are green or skipped, 1 when one is yellow, 2 when one is red. opd doctor verl looks at the plugin alone, and
exits with 0 when every check passes, otherwise with 1; a failed check is marked FAIL. With the words after python -m
verl.trainer.main_ppo it looks at the models and prompts that they name, too, as opd verl smoke does before it runs them."""
RECIPES = (".yaml", ".yml")


def run(args: Sequence[str]) -> int:
    if "-h" in args or "--help" in args:
        print(f"usage: {USAGE}\n\n{HELP}")
        return 0
    args = list(args)
    if args == ["verl"]:
        from opd.integrations.verl.contract.doctor import run as examine_plugin

        return examine_plugin()
    if args[:1] == ["verl"]:
        return _examine_verl(args[1:])
    as_json, rest = "--json" in args, [word for word in args if word != "--json"]
    prompts, rest = _prompts(rest)
    recipe = rest.pop(0) if rest and not rest[0].startswith("--") else None
    if recipe is not None and not recipe.endswith(RECIPES) and not Path(recipe).is_file():
        raise ConfigError(f"'{recipe}' is no recipe and no plugin: {USAGE}")
    if recipe is None and rest:
        raise ConfigError(f"Give the recipe first: {USAGE}")
    return _report(_examine(recipe, rest, prompts), recipe, as_json)


def _examine_verl(args: Sequence[str]) -> int:
    from transformers.utils.logging import disable_progress_bar

    from opd.cli.verl_doctor import check_plugin, examine_words
    from opd.errors import MissingDependencyError

    words = [word for word in args if word != "--json"]
    if importlib.util.find_spec("verl") is None:
        raise MissingDependencyError("verl is not installed in this environment; pip install 'opd[verl]'.")
    disable_progress_bar()
    return _report([check_plugin(), *(examine_words(words) if words else [])], None, "--json" in args)


def _examine(recipe: str | None, overrides: Sequence[str], prompts: int) -> list[Check]:
    from opd.doctor.check import failed, run_checks
    from opd.doctor.machine import check_machine

    if recipe is None:
        return run_checks({"machine": check_machine})
    from transformers.utils.logging import disable_progress_bar

    from opd.config.recipe import load
    from opd.reporting.loading import Loading

    disable_progress_bar()
    try:
        config = load(recipe, overrides)
    except OpdError as error:
        return [*run_checks({"machine": check_machine}), failed("recipe", error)]
    from opd.trainer.examine import examine

    with Loading(enabled=config.log.progress, stream=sys.stderr) as loading:  # the table alone goes to stdout
        return examine(config, prompts=prompts, loading=loading)


def _report(checks: Sequence[Check], recipe: str | None, as_json: bool) -> int:
    from opd.doctor.check import exit_code
    from opd.doctor.shown import as_json as document
    from opd.doctor.shown import show_table

    if as_json:
        print(document(checks, recipe))
    else:
        show_table(checks, sys.stdout)
    return exit_code(checks)


def _prompts(words: Sequence[str]) -> tuple[int, list[str]]:
    """The number after --prompts, and the other words."""
    rest = list(words)
    for place, word in enumerate(rest):
        name, equals, value = word.partition("=")
        if name != "--prompts":
            continue
        value = value if equals else "".join(rest[place + 1 : place + 2])
        if not value.isdecimal() or int(value) < 1:
            raise ConfigError(f"--prompts takes a number of prompts, not '{value}': {USAGE}")
        return int(value), rest[:place] + rest[place + (1 if equals else 2) :]
    return 32, rest

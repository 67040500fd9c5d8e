"""`opd train`: runs a recipe."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opd.cli.devices import launch, split_devices, started_elsewhere
from opd.errors import ConfigError
from opd.joining import ranks_of, session
from opd.ranks import Ranks

if TYPE_CHECKING:
    from opd.trainer.loop import Ended

USAGE = "opd train RECIPE.yaml [--resume | --overwrite] [--devices N] [--debug] [--section.key value …]"
STOPPED_BY_RULE = 3
"""Exit code of a run that a rule of the section guard ended; its checkpoint, student and report are there."""


def run(args: Sequence[str]) -> int:
    if "-h" in args or "--help" in args:
        print_help(USAGE, args)
        return 0
    devices, words = split_devices(args)
    if started_elsewhere(os.environ) and len(words) < len(args):
        raise ConfigError(
            f"torchrun has started {os.environ['WORLD_SIZE']} processes, and --devices would start more. Drop --devices, or start without "
            "torchrun: opd train recipe.yaml --devices N."
        )
    if devices > 1 and ranks_of(os.environ)[1] == 1:
        _check_recipe(words, devices)
        return launch(devices, args)
    with session() as ranks:
        return _train(words, args, ranks)


def _check_recipe(words: Sequence[str], devices: int) -> None:
    """Refuse, before a process is started, what can be refused without torch."""
    from opd.config.ranks import check_ranks
    from opd.config.recipe import check, words_of
    from opd.doctor.paths import check_paths

    recipe, _, _, overrides = split_arguments(words)
    settings = check(words_of(recipe, overrides))
    check_ranks(settings, devices)
    check_paths(settings)


def _train(words: Sequence[str], args: Sequence[str], ranks: Ranks) -> int:
    """Train on the recipe of `words`, as one of `ranks`. Only rank 0 returns, and only it prints."""
    recipe, resume, overwrite, overrides = split_arguments(words)
    from opd.cli.banner import show_banner, show_checks
    from opd.config.ranks import check_ranks
    from opd.config.recipe import check, words_of
    from opd.doctor.paths import check_paths

    settings = check(words_of(recipe, overrides))
    check_ranks(settings, ranks.world)
    check_paths(settings)  # before torch, which takes seconds to import
    announced = ranks.first and show_banner(settings)
    import torch  # noqa: F401  # so that transformers is imported with it

    said, read = show_checks(settings, ranks.world) if announced else (frozenset[str](), None)
    from transformers.utils.logging import disable_progress_bar

    from opd.cli.show import show_result
    from opd.config.whole import whole_config
    from opd.trainer.distiller import Distiller
    from opd.trainer.follow import check_together, follow
    from opd.trainer.launch import Launch

    disable_progress_bar()  # loading and saving take a moment; downloads keep theirs
    if not ranks.alone:
        check_together(settings, ranks)
    if not ranks.first:
        follow(ranks)
    config = whole_config(settings)
    folder = Path(recipe).resolve().parent if recipe else Path.cwd()
    start = Launch(folder=folder, announced=announced, said=said, read=read)
    trained = Distiller.from_config(config, launch=start, ranks=ranks).train(resume=resume, overwrite=overwrite)
    show_result(config, trained.summary)
    if trained.hub:
        print(trained.hub)
    return exit_code(trained.ended, "train", args)


def exit_code(ended: Ended | None, command: str, args: Sequence[str]) -> int:
    """0, or what says that a rule ended the run; then the command that goes on is printed."""
    if ended is None or ended.rule is None:
        return 0
    words = [word for word in args if word not in ("--resume", "--overwrite")]
    print(f"{ended.why} Continue with: {shlex.join(['opd', command, *words, '--resume'])}", file=sys.stderr)
    return STOPPED_BY_RULE


def split_arguments(args: Sequence[str]) -> tuple[str | None, bool, bool, list[str]]:
    """(recipe, resume, overwrite, overrides) from the words after the command."""
    rest = [a for a in args if a not in ("--resume", "--overwrite")]
    recipe = rest.pop(0) if rest and not rest[0].startswith("--") else None
    late = next((a for a in rest if a.endswith((".yaml", ".yml"))), None) if recipe is None else None
    if late is not None:
        raise ConfigError(f"The recipe comes first: opd train {late} {rest[0]} …")
    if recipe is None and not rest:
        raise ConfigError(f"Give a recipe: {USAGE}. A first one is recipes/demo/recipe.yaml; 'opd demo' runs it.")
    return recipe, "--resume" in args, "--overwrite" in args, rest


def print_help(usage: str, args: Sequence[str] = ()) -> None:
    """Print every section and field with its default, as tyro renders the dataclasses; with a section after --help, that one alone. Raises
    ConfigError for a section that is none."""
    import tyro

    from opd.cli.help_section import asked_for, narrowed, shown_settings
    from opd.config import RunSettings

    section = asked_for(args) if args else None
    kind, shown = (RunSettings, shown_settings()) if section is None else narrowed(section)
    as_values = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
    try:
        tyro.cli(kind, prog=usage, default=shown, args=["--help"], config=as_values)
    except SystemExit as ended:
        if ended.code:  # the reader of a pipe has gone
            raise
        print(MORE_HELP if section is None else f"All sections: {usage.split(' ')[0]} {usage.split(' ')[1]} --help")


MORE_HELP = """--help SECTION  the keys of one section, e.g. --help optimizer, --help rollout.vllm
--resume      continue the run in run_dir from its last checkpoint; changed settings are printed and kept in history.jsonl
--overwrite   delete the run in run_dir and start again; a link is deleted, its target kept
--devices N   train in N processes, one for each GPU of this machine, as torchrun --nproc-per-node N -m opd train does
--debug       show the traceback of an error
--student.chat_template_kwargs.NAME VALUE, --teacher.chat_template_kwargs.NAME VALUE
              arguments of each model's chat template, e.g. --student.chat_template_kwargs.enable_thinking false
--teachers.NAME.KEY VALUE
              several teachers, each with every key of --teacher, e.g. --teachers.math.model PATH --teachers.code.model PATH
--mixture.weights.NAME VALUE, --mixture.weights_end.NAME VALUE
              the weight of each teacher, e.g. --mixture.weights.math 0.7 --mixture.weights.code 0.3
Names may be written with - or _. Paths are relative to where the command runs."""

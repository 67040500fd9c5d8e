"""`opd rollouts`: draws and scores the student's rollouts once, before training, for rollout.source=cached."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial

from opd.cli.train import print_help, split_arguments
from opd.config.recipe import check, merge, words_of
from opd.doctor.paths import check_paths
from opd.errors import ConfigError

USAGE = "opd rollouts RECIPE.yaml [--out DIR] [--overwrite] [--debug] [--section.key value …]"


def run(args: Sequence[str]) -> int:
    if "-h" in args or "--help" in args:
        print_help(USAGE, args)
        return 0
    out, rest = _out(args)
    recipe, resume, overwrite, words = split_arguments(rest)
    if resume:
        raise ConfigError("opd rollouts goes on by itself where it was stopped; drop --resume.")
    data = words_of(recipe, words)
    section = data.get("rollout") or {}
    folder = out or (section.get("path") if isinstance(section, dict) else None)
    if not folder:
        raise ConfigError("Name the folder that the rollouts go to: --out DIR, or rollout.path in the recipe.")
    data = merge(data, {"rollout.source": "cached", "rollout.path": folder})
    settings = check(data)
    check_paths(settings)  # before torch, which takes seconds to import
    from transformers.utils.logging import disable_progress_bar

    from opd.config.whole import whole_config
    from opd.trainer.keep_rollouts import advice, keep_rollouts

    disable_progress_bar()
    manifest = keep_rollouts(whole_config(settings), overwrite=overwrite, say=partial(print, flush=True))
    print(advice(manifest))
    given = shlex.join(
        [*([recipe] if recipe else []), *words, "--rollout.source", "cached", "--rollout.path", str(folder)]
    )
    print(f"train on them: opd train {given}")
    return 0


def _out(args: Sequence[str]) -> tuple[str | None, list[str]]:
    """The folder after --out, and the other words."""
    rest = list(args)
    for place, word in enumerate(rest):
        name, equals, value = word.partition("=")
        if name != "--out":
            continue
        if not equals and (place + 1 == len(rest) or rest[place + 1].startswith("--")):
            raise ConfigError(f"--out needs a folder: {USAGE}")
        folder = value if equals else rest[place + 1]
        return folder, rest[:place] + rest[place + (1 if equals else 2) :]
    return None, rest

"""`opd demo`: trains a teacher and a flawed student, then runs the demo's recipe exactly as `opd train` would."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from opd.cli.train import exit_code, print_help
from opd.config.recipe import check, merge, parse_overrides, read_recipe
from opd.demo.recipe import recipe_path
from opd.errors import ConfigError

USAGE = "opd demo [--resume | --overwrite] [--debug] [--section.key value …]"


def run(args: Sequence[str]) -> int:
    if "-h" in args or "--help" in args:
        print_help(USAGE, args)
        return 0
    began = time.perf_counter()
    rest = [a for a in args if a not in ("--resume", "--overwrite")]
    if rest and not rest[0].startswith("--"):
        raise ConfigError(f"The demo has its own recipe; leave '{rest[0]}' out, or use opd train. Usage: {USAGE}")
    resume, overwrite = "--resume" in args, "--overwrite" in args
    overrides = parse_overrides(rest)
    recipe = read_recipe(recipe_path())
    folder = Path(str(overrides.get("run_dir", recipe["run_dir"])))
    places = {
        "student.model": folder / "base",
        "teacher.model": folder / "teacher",
        "prompts.path": folder / "train.jsonl",
        "prompts.eval_path": folder / "eval.jsonl",
    }
    data = merge(merge(recipe, {key: str(path) for key, path in places.items()}), overrides)
    settings = check(data)  # before torch, which takes seconds to import
    from opd.cli.show import show_result
    from opd.config.whole import whole_config
    from opd.demo.prepare import prepare
    from opd.reporting.files import SUMMARY_FILE
    from opd.reporting.summary import write_summary
    from opd.trainer.distiller import Distiller
    from opd.trainer.launch import Launch
    from opd.trainer.run_folder import open_run
    from opd.trainer.run_state import write_report_or_warn

    config = whole_config(settings)
    with open_run(config, resume=resume, overwrite=overwrite):
        prepare(folder, seed=config.seed, say=partial(print, flush=True))
    prepared = time.perf_counter() - began
    launch = Launch(folder=recipe_path().parent)
    trained = Distiller.from_config(config, launch=launch).train(resume=resume, overwrite=overwrite)
    summary = trained.summary
    if summary is not None:
        summary |= {"preparation_seconds": prepared, "seconds": time.perf_counter() - began}
        write_summary(folder / SUMMARY_FILE, summary)
        write_report_or_warn(folder, lambda text, _: print(f"warning: {text}"))
    show_result(config, summary)
    return exit_code(trained.ended, "demo", args)

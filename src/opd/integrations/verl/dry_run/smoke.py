"""`opd verl smoke`: a user's own verl config for a few steps on the CPU, with small models in the place of large ones."""

# pyright: reportMissingImports=false
from __future__ import annotations

import importlib
import json
import math
import os
import shlex
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from transformers.utils.logging import disable_progress_bar

from opd.errors import OpdError
from opd.integrations.verl.dry_run.compose import ROLLOUT, ConfigOverrides, Words, compose, literal, read_words
from opd.integrations.verl.dry_run.launch import Ended, cpu_environment, first_error, launch, ray_folder
from opd.integrations.verl.dry_run.shrink_config import (
    check_given,
    check_sizes,
    model_overrides,
    replace,
    requested_models,
)
from opd.integrations.verl.dry_run.tiny_models import StandIn, make_models
from opd.integrations.verl.plugin.settings import parse

STEPS = 2
LIMIT_SECONDS = 600.0  # two steps take about 70 on two idle cores
PREFIX = "actor/opd/"
LOSSES = (f"{PREFIX}loss", "actor/loss", "actor/pg_loss", "critic/vf_loss")
"""Metrics of a step's first line, as far as they are there."""
OWN_LIBRARY = "opd.integrations.verl.dry_run.register"
"""Of +opd_device=cpu: for verl's processes alone."""
LAST_LINES = 3
WIDTH = 110


class SmokeError(OpdError):
    """The dry run did not get through its steps."""


def smoke(
    words: Sequence[str],
    *,
    steps: int = STEPS,
    limit: float = LIMIT_SECONDS,
    try_verl: bool = False,
    say: Callable[[str], None] = lambda text: print(text, flush=True),
) -> Path:
    """Run it; returns the folder with log.txt, metrics.jsonl and command.txt. Raises OpdError for the first thing that is wrong.

    `words` are the user's own for `python -m verl.trainer.main_ppo`; `limit` is in seconds, for everything together; `try_verl` sets
    opd.try_verl.
    """
    end = time.monotonic() + limit
    distils = any(word.lstrip("+").startswith("opd=") for word in words)
    given = read_words([*words, *(["++opd.try_verl=true"] if try_verl and distils else [])])
    config = compose(given)
    check_given(config)
    if config.get("opd") is None:
        say("note: without +opd=default this is verl's own training; nothing is distilled")
    else:
        parse(OmegaConf.to_container(config.opd, resolve=True))  # pyright: ignore[reportArgumentType]
    check_sizes(config)
    folder = Path(tempfile.mkdtemp(prefix="opd-smoke-"))
    run = _Run(folder=folder, end=end, limit=limit, say=say)
    disable_progress_bar()  # small models are written in a moment
    try:
        run.import_library(config)
        models = make_models(requested_models(config), folder)
        run.real_names = {model.folder: model.requested.path for model in models}
        changes = replace(config, models, folder=folder, steps=steps)
        say(table(changes))
        run.check_own_config(given, config, models)
        run.train(given, changes, steps)
    finally:
        for made in folder.glob("model*"):
            shutil.rmtree(made)
        if not (folder / "check.txt").exists():
            shutil.rmtree(folder)  # nothing was run, and there is nothing to read
    return folder


def table(changes: ConfigOverrides) -> str:
    """The table of replacements."""
    rows = [("", "your config", "here"), *changes.rows]
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    second = min(second, WIDTH // 2)
    return "\n".join(f"{what:<{first}}  {own:<{second}}  {here}" for what, own, here in rows)


@dataclass
class _Run:
    """The two processes of a dry run: verl's checks of the user's own sizes, then the training."""

    folder: Path
    end: float
    limit: float
    say: Callable[[str], None]
    real_names: Mapping[str, str] = field(default_factory=dict)
    """Of stand-ins by folder: messages name what the user knows."""
    shown: int = 0
    """Steps that were printed."""
    odd: str = ""
    """The first metric that is no number."""

    def import_library(self, config: DictConfig) -> None:
        """Let the classes that model.external_lib registers be known to transformers, as verl's workers do."""
        library = config.actor_rollout_ref.model.get("external_lib")
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())  # where `python -m` looks
        for name in library if OmegaConf.is_list(library) else [library]:
            if name in (None, OWN_LIBRARY):
                continue
            try:
                importlib.import_module(str(name))
            except Exception as error:  # anything, of somebody else's module
                reason = f"{type(error).__name__}: {error}"
                raise SmokeError(
                    f"actor_rollout_ref.model.external_lib={name} cannot be imported: {reason}. Install it here, or leave it out of the "
                    "dry run."
                ) from error

    def check_own_config(self, given: Words, config: DictConfig, models: Sequence[StandIn]) -> None:
        values = model_overrides(models)
        if config.actor_rollout_ref.model.lora_rank > 0:
            values[f"{ROLLOUT}.name"] = "transformers"  # verl would ask vLLM for its greatest rank
        words = [*given.flags(), *given.overrides, *(f"++{key}={literal(value)}" for key, value in values.items())]
        log = self.folder / "check.txt"
        with cpu_environment(self.folder / "unused.jsonl") as env:
            ended = self._launch([sys.executable, "-m", "opd.integrations.verl.dry_run.compose", *words], log, env)
        text = self._read(log)
        for line in text.splitlines():
            if line.startswith("opd") and ended.code == 0:
                self.say(line)
        if ended.code != 0:
            said = first_error(text) or ""
            who = "opd" if said.startswith("opd.") else "verl"
            refused = f"{who} refuses this config"
            what = refused if ended.code is not None else self._over("before verl had read this config")
            raise SmokeError(_why(what, text, log))

    def train(self, given: Words, changes: ConfigOverrides, steps: int) -> None:
        log, metrics = self.folder / "log.txt", self.folder / "metrics.jsonl"
        with cpu_environment(metrics) as env:
            env["PYTHONPATH"] = f"{self.folder}:{env['PYTHONPATH']}" if env.get("PYTHONPATH") else str(self.folder)
            command = [sys.executable, "-m", "verl.trainer.main_ppo", *given.flags(), *given.overrides]
            command += changes.overrides()
            command += [
                f"++ray_kwargs.ray_init._temp_dir={ray_folder(env)}",
                "++ray_kwargs.ray_init.address=local",
                f"hydra.run.dir={self.folder / 'hydra'}",
            ]
            (self.folder / "command.txt").write_text(" \\\n  ".join(map(shlex.quote, command)) + "\n", encoding="utf-8")
            self.say(f"running verl, about a minute before the first step; log: {log}")
            ended = self._launch(command, log, env, lambda: self._tell_steps(metrics))
        if ended.code != 0:
            far = f"after {self.shown} of {steps} steps"
            what = f"verl stopped {far}" if ended.code is not None else self._over(far)
            raise SmokeError(_why(what, self._read(log), log))
        if self.odd:
            raise SmokeError(f"{self.odd}, in a run that verl ended without an error; look at {log}.")
        if self.shown < steps:
            raise SmokeError(f"verl ended without an error after {self.shown} of {steps} steps; look at {log}.")
        self.say(f"ok: {self.shown} steps in {ended.seconds:.0f} s; log: {log}")

    def _launch(
        self, command: Sequence[str], log: Path, env: Mapping[str, str], watch: Callable[[], None] = lambda: None
    ) -> Ended:
        return launch(command, log=log, env=env, limit=max(1.0, self.end - time.monotonic()), watch=watch)

    def _read(self, log: Path) -> str:
        text = log.read_text(encoding="utf-8", errors="replace")
        for folder, name in self.real_names.items():
            text = text.replace(folder, name)
        return text

    def _over(self, far: str) -> str:
        return (
            f"the limit of {self.limit:.0f} s was over {far}; verl waits for ever when one of its processes dies, and --timeout SECONDS "
            "gives a slow one longer"
        )

    def _tell_steps(self, metrics: Path) -> None:
        if not metrics.exists():
            return
        complete = metrics.read_text(encoding="utf-8").splitlines(keepends=True)[self.shown :]
        for line in complete:
            if line.endswith("\n"):
                self.shown += 1
                entry = json.loads(line)
                self.say(step_lines(entry["step"], entry["data"]))
                odd = [name for name, value in _numbers(entry["data"]).items() if not math.isfinite(value)]
                self.odd = self.odd or (f"step {entry['step']}: {odd[0]} is not finite" if odd else "")


def _why(what: str, text: str, log: Path) -> str:
    said = first_error(text)
    if said is None:
        last = [line.rstrip() for line in text.splitlines() if line.strip()][-LAST_LINES:]
        said = "\n".join(["the log shows no error; its last lines:", *last])
    return f"{what}:\n{textwrap.indent(said, '  ')}\n  full log: {log}"


def _numbers(data: Mapping[str, object]) -> dict[str, float]:
    """The losses, and what opd measures. JSON has null for NaN."""
    return {
        name: math.nan if value is None else float(value)  # pyright: ignore[reportArgumentType]
        for name, value in data.items()
        if name in LOSSES or name.startswith(PREFIX)
    }


def step_lines(step: int, data: Mapping[str, object]) -> str:
    """Losses on the first line, the rest of what opd measures below."""
    numbers = _numbers(data)
    first = "  ".join(f"{name} {numbers[name]:.5g}" for name in LOSSES if name in numbers)
    rest = [f"{name.removeprefix(PREFIX)} {value:.4g}" for name, value in numbers.items() if name not in LOSSES]
    below = textwrap.wrap("  ".join(rest), WIDTH, initial_indent="  ", subsequent_indent="  ", break_long_words=False)
    return "\n".join([f"step {step}: {first}", *below])

"""`opd doctor verl`: checks of a fresh process, because verl hides a plugin that failed to load."""

# pyright: reportMissingImports=false
from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from opd.integrations.verl.contract.source_check import (
    BY_PART,
    HOOKS,
    PARTS,
    TESTED,
    expected,
    installed,
    moved,
    version_of,
)

PLUGIN = "opd.integrations.verl.plugin.register"
TIMEOUT_SECONDS = 300.0  # importing verl from a cold disk takes a minute
NEEDED = ("ray", "tensordict", "transfer_queue", "cachetools", "uvicorn", "fastapi", "msgspec", "zmq", "hydra",
          "codetiming")  # fmt: skip
"""Imports of verl's trainer at run time; verl's own requirements miss some of them."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    ok: bool
    text: str


def run() -> int:
    """Ask a fresh process, print what it says; 0 when everything is in place, 1 otherwise."""
    code, said = ask()
    print(said, end="", file=sys.stderr if said.startswith("error: ") else sys.stdout)
    return code


def ask() -> tuple[int, str]:
    """What a fresh process says: 0 and its lines when everything is in place, otherwise 1."""
    command = [sys.executable, "-m", "opd.integrations.verl.contract.doctor"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return 1, f"error: importing verl took more than {TIMEOUT_SECONDS:.0f} s; look at the machine's disk.\n"
    crashed = done.returncode not in (0, 1)
    return min(1, abs(done.returncode)), done.stdout + (done.stderr[-2000:] if crashed else "")


def findings() -> Iterator[Finding]:
    """All checks, the ones that others rest on first; the first that makes the others pointless ends them."""
    if importlib.util.find_spec("verl") is None:
        yield _fail("verl is not installed: pip install 'opd[verl]'")
        return
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        yield _fail(f"verl needs {', '.join(missing)}, not installed: pip install 'opd[verl]'")
        return
    for check in (_version, _entry_point, _config_group, _hooks, _engine, _trl):
        yield check()


def _ok(text: str) -> Finding:
    return Finding(ok=True, text=text)


def _fail(text: str) -> Finding:
    return Finding(ok=False, text=text)


def _version() -> Finding:
    version = version_of(installed())
    if version in TESTED:
        return _ok(f"verl {version} is a release that opd was tested with")
    others = ", ".join(TESTED)
    return _ok(
        f"note: verl {version} is none of the releases that opd was tested with ({others}); the hooks below decide"
    )


def _entry_point() -> Finding:
    importlib.import_module("verl")
    if PLUGIN in sys.modules:
        return _ok("`import verl` loads the plugin")
    if PLUGIN not in [entry.value for entry in importlib.metadata.entry_points(group="verl.plugins")]:
        return _fail("opd is installed without its entry point 'verl.plugins'; install it again: pip install opd")
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
    return _fail(
        f"`import verl` did not load the plugin (VERL_USE_EXTERNAL_PLUGINS={policy}); set it to auto, or import {PLUGIN} to see why"
    )


def _config_group() -> Finding:
    from hydra import compose, initialize_config_module

    overrides = ["+opd=default", "opd.teacher.model=teacher", "actor_rollout_ref.rollout.name=vllm"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides)
    target = config.actor_rollout_ref.actor.fsdp_config._target_
    if target != "opd.integrations.verl.plugin.hydra_targets.engine_config":
        return _fail(f"+opd=default does not reach the actor's engine, whose config is made by {target}")
    return _ok("+opd=default is a config group of verl.trainer.main_ppo")


def _hooks() -> Finding:
    folder = installed()
    hooks = expected(version_of(folder), HOOKS)
    gone = moved(folder, hooks)
    if not gone:
        return _ok(f"{len(hooks)} hooks of verl are where they were")
    changes = "; ".join(map(str, gone))
    parts = {part for part, own in BY_PART.items() for one in gone if one.hook in own}
    if parts and not parts & set(PARTS):
        return _ok(f"note: +opd=default needs none of what verl has changed: {changes}")
    return _fail(f"verl has changed under this plugin: {changes}")


def _engine() -> Finding:
    from verl.workers.engine import EngineRegistry

    from opd.integrations.verl.plugin.engine import OpdEngine

    found = EngineRegistry.get_engine_cls("language_model", "fsdp2")
    if found is not OpdEngine:
        return _fail(f"the FSDP2 engine on this device is {found.__module__}.{found.__name__}, not opd's")
    return _ok("the FSDP2 engine on this device is opd's, where the config asks for it")


def _trl() -> Finding:
    if importlib.util.find_spec("trl") is None:
        return _ok("trl is not installed (its newer releases break the start of verl's FSDP engines)")
    version = importlib.metadata.version("trl")
    return _ok(f"note: trl {version} is installed; from 1.16 on it breaks the start of verl's FSDP engines")


def main() -> int:
    """Print the findings of this process."""
    failed = False
    for finding in findings():
        print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.text}", flush=True)
        failed |= not finding.ok
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

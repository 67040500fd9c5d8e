"""`opd verl patch`: put the git patch for verl's own tree into one, look at it, or take it out, by the `apply_patch.sh` beside it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import opd
from opd.errors import ConfigError, MissingDependencyError

MODES = {"apply": (), "check": ("--check",), "verify": ("--verify",), "reverse": ("--reverse",)}
FOR_A_CHECKOUT = ("build", "pack")
USAGE = "opd verl patch apply|check|verify|reverse …"
HELP = """
apply [--3way | --am] [--try] [--no-verify] [--python PYTHON] DIR | --installed
          into a checkout or an unpacked release, or into the verl that PYTHON imports. --try: a verl that the patch was not made
          for gets it if every line of it fits
check, verify, reverse [--try] [--python PYTHON] DIR | --installed
          say what would happen; say whether it is in and works; take it out
The same without opd: patches/apply_patch.sh. In a checkout of opd, python -m tools.verl_patch builds and packs the patch."""


def run(args: Sequence[str]) -> int:
    if not args or "-h" in args or "--help" in args:
        print(f"usage: {USAGE}\n{HELP}")
        return 0 if args else 2
    command, words = args[0], list(args[1:])
    if command in FOR_A_CHECKOUT:
        raise ConfigError(f"The patch is made in a checkout of opd: python -m tools.verl_patch {command}")
    if command not in MODES:
        raise ConfigError(f"opd verl patch has no command '{command}': {USAGE}")
    if not words:
        raise ConfigError(
            f"Give the folder of a verl checkout or release, or --installed: opd verl patch {command} DIR"
        )
    bash = shutil.which("bash")
    if bash is None:
        raise MissingDependencyError("apply_patch.sh is a bash script, and bash is not on this machine; install it.")
    python = () if "--python" in words else ("--python", sys.executable)
    return subprocess.run([bash, str(installer()), *MODES[command], *python, *words], check=False).returncode


def installer() -> Path:
    """`apply_patch.sh` inside the installed package, or in a checkout. Raises ConfigError when there is none."""
    package = Path(opd.__file__).parent
    for folder in (package / "patches", package.parents[1] / "patches"):
        if (folder / "apply_patch.sh").is_file():
            return folder / "apply_patch.sh"
    raise ConfigError("This installation of opd carries no patch; take the folder patches/ of its repository.")

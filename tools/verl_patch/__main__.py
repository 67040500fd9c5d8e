"""`python -m tools.verl_patch`: build the patch for verl's own tree, and pack it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from opd.errors import ConfigError, OpdError
from tools.verl_patch.builder import build, pack
from tools.verl_patch.release import SUPPORTED, read_release


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tools.verl_patch", description=__doc__)
    commands = made.add_subparsers(dest="command", required=True)
    builds = commands.add_parser("build", help=f"write the patch for verl {', '.join(SUPPORTED)}, or for one release")
    builds.add_argument("--verl", metavar="VERSION", help="for this release alone")
    builds.add_argument("--archive", type=Path, help="its wheel or source archive; else pip downloads it, once")
    builds.add_argument(
        "--try", action="store_true", dest="untested", help="a release that the patch was not tested with"
    )
    builds.add_argument("--out", type=Path, help="folder; by default patches, and with --verl dist/verl-VERSION")
    packs = commands.add_parser("pack", help="patches/ as one archive with checksums")
    packs.add_argument("--out", type=Path, default=Path("dist"), help="folder")
    return made


def main(words: Sequence[str] | None = None) -> int:
    told = parser().parse_args(words)
    try:
        written = pack(told.out) if told.command == "pack" else _build(told)
    except OpdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(map(str, written)))
    return 0


def _build(told: argparse.Namespace) -> list[Path]:
    if told.verl is None:
        if told.archive is not None or told.untested:
            raise ConfigError("--archive and --try are about one release; say which, e.g. --verl 0.9.1.")
        return build({version: read_release(version) for version in SUPPORTED}, told.out or Path("patches"))
    if told.verl not in SUPPORTED and not told.untested:
        raise ConfigError(
            f"verl {told.verl} is not supported; supported are {', '.join(SUPPORTED)}. --try builds it where every hook has its place."
        )
    release = read_release(told.verl, told.archive)
    return build({told.verl: release}, told.out or Path("dist") / f"verl-{told.verl}")


if __name__ == "__main__":
    sys.exit(main())

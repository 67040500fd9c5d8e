"""`opd verl patch`: build the git patches for verl's own tree, and put them into one or take them out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from opd.errors import ConfigError

USAGE = "opd verl patch build|apply|check|verify|reverse|pack …"
HELP = """
build --verl VERSION [--try] [--archive FILE] [--out DIR]
          patches/VERSION/0001-on-policy-distillation.patch and what goes with it, from the release of verl on the package index
          (kept in ~/.cache/opd/verl) or from FILE, its wheel or source archive; DIR is ./patches. --try: of a release that the
          patch was not tested with
apply [--3way | --am] [--try] [--no-verify] [--python PYTHON] DIR | --installed
          into a checkout or an unpacked release, or into the verl that PYTHON imports. --try: a verl that no patch was made for
          gets the one for the nearest release, if every line of it fits
check, verify, reverse [--try] [--python PYTHON] DIR | --installed
          say what would happen; say whether it is in and works; take it out
pack [--out DIR]
          the patches as one archive with checksums; DIR is ./dist
The same without opd: patches/apply_patch.sh"""


def run(args: Sequence[str]) -> int:
    if not args or "-h" in args or "--help" in args:
        print(f"usage: {USAGE}\n{HELP}")
        return 0 if args else 2
    from opd.integrations.verl.patch.builder import build
    from opd.integrations.verl.patch.installer import MODES, pack
    from opd.integrations.verl.patch.installer import run as install

    command, rest = args[0], list(args[1:])
    if command in MODES:
        if not rest:
            raise ConfigError(
                f"Give the folder of a verl checkout or release, or --installed: opd verl patch {command} DIR"
            )
        return install(command, rest)
    if command == "build":
        untested = "--try" in rest
        options = _options([word for word in rest if word != "--try"], "--verl", "--archive", "--out")
        if "--verl" not in options:
            raise ConfigError("Say for which verl: opd verl patch build --verl 0.9.1")
        archive = Path(options["--archive"]) if "--archive" in options else None
        written = build(options["--verl"], Path(options.get("--out", "patches")), archive, untested=untested)
    elif command == "pack":
        written = pack(Path(_options(rest, "--out").get("--out", "dist")))
    else:
        raise ConfigError(f"opd verl patch has no command '{command}': {USAGE}")
    print("\n".join(map(str, written)))
    return 0


def _options(words: Sequence[str], *known: str) -> dict[str, str]:
    """--name value and --name=value."""
    found: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name not in known:
            raise ConfigError(f"{word} is not an option here; there are {', '.join(known)}.")
        found[name] = value if equals else next(rest, "")
        if not found[name]:
            raise ConfigError(f"{name} needs a value.")
    return found

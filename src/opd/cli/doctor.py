"""`opd doctor verl`: checks in a fresh process that the verl plugin is installed and loaded."""

from __future__ import annotations

from collections.abc import Sequence

from opd.errors import ConfigError

USAGE = "opd doctor verl"


def run(args: Sequence[str]) -> int:
    if "-h" in args or "--help" in args:
        print(
            f"usage: {USAGE}\n\nExits with 0 when every check passes, otherwise with 1; a failed check is marked FAIL."
        )
        return 0
    if list(args) != ["verl"]:
        raise ConfigError(f"Name the plugin to check: {USAGE}")
    from opd.integrations.verl.contract.doctor import run as examine

    return examine()

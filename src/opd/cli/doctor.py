"""`opd doctor verl`: prove in a fresh process that the plugin is in."""

from __future__ import annotations

from collections.abc import Sequence

from opd.errors import ConfigError

USAGE = "opd doctor verl"


def run(args: Sequence[str]) -> int:
    if "-h" in args or "--help" in args:
        print(f"usage: {USAGE}\n\n0 when everything is in place; otherwise 1, and what is not is marked FAIL.")
        return 0
    if list(args) != ["verl"]:
        raise ConfigError(f"Name the plugin to look at: {USAGE}")
    from opd.integrations.verl.contract.doctor import run as examine

    return examine()

"""`opd report`: writes the report of a run folder again, also during the run."""

from __future__ import annotations

from collections.abc import Sequence

from opd.errors import ConfigError
from opd.reporting.report import write_report

USAGE = "opd report RUN_DIR"


def run(args: Sequence[str]) -> int:
    if "-h" in args or "--help" in args:
        print(f"usage: {USAGE}")
        return 0
    if len(args) != 1 or args[0].startswith("-"):
        raise ConfigError(f"Give one run folder: {USAGE}")
    print(write_report(args[0]))
    return 0

"""`opd report`: writes the report of a run folder again, also during the run."""

from __future__ import annotations

from collections.abc import Sequence

from opd.errors import ConfigError
from opd.reporting.report import write_report

USAGE = "opd report RUN_DIR"
HELP = f"""usage: {USAGE}

Writes RUN_DIR/report.html from the records of the run, which may still go on, have crashed, or have been stopped. A run writes it
itself, at its end, at evaluations and every minute. opd watch RUN_DIR shows it in the browser while the run goes on."""


def run(args: Sequence[str]) -> int:
    if "-h" in args or "--help" in args:
        print(HELP)
        return 0
    if len(args) != 1 or args[0].startswith("-"):
        raise ConfigError(f"Give one run folder: {USAGE}")
    print(write_report(args[0]))
    return 0

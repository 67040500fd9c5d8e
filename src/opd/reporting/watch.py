"""A run's report on this machine's loopback address, made anew as the run goes on."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from opd.errors import ConfigError, OpdError
from opd.reporting.about import read_state
from opd.reporting.files import (
    ABOUT_FILE,
    CONFIG_FILE,
    HISTORY_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    SUMMARY_FILE,
)
from opd.reporting.page import render_page
from opd.reporting.report import report_page

HOST = "127.0.0.1"
OWN_HOSTS = ("127.0.0.1", "localhost", "::1")
READ = (METRICS_FILE, SAMPLES_FILE, SUMMARY_FILE, CONFIG_FILE, HISTORY_FILE, ABOUT_FILE)
EVERY_S = 5.0
"""The report is made anew at most this often, and takes at most SHARE of the time."""
SHARE = 0.2
READ_TIMEOUT_S = 10.0
PLACE = "opd-version-of-this-page"
"""Where the version of a page comes to stand, which is a hash of all the rest."""
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class LiveReport:
    """The page of a run folder, kept up to date on request. Nothing is written into the folder."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises RunFolderError for a folder that holds no run."""
        self.folder = folder
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: tuple[object, ...] = ()
        self._written = 0.0
        self._cost = 0.0
        self.page = b""
        self.version = ""
        self._write(self._signature())

    def refresh(self) -> tuple[str, bytes]:
        """(version, page), written again when the run's files have changed and the last time is long enough ago."""
        with self._lock:
            waited = self._clock() - self._written
            seen = self._signature()
            if seen != self._seen and waited >= max(EVERY_S, self._cost / SHARE):
                try:
                    self._write(seen)
                except (
                    OpdError,
                    OSError,
                ) as error:  # such as a folder that was moved: said in the page, until it is back
                    self._keep(_error_page(error), seen)
            return self.version, self.page

    def _signature(self) -> tuple[object, ...]:
        """Everything that the page depends on. state.json is replaced every second; what it says is what counts."""
        found: list[object] = []
        for name in READ:
            try:
                status = (self.folder / name).stat()
                found.append((name, status.st_size, status.st_mtime_ns))
            except OSError:
                found.append((name, None))
        with suppress(OpdError):
            state = read_state(self.folder)
            found.append(None if state is None else (state.name, state.step, state.steps, state.why, state.alive))
        return tuple(found)

    def _write(self, seen: tuple[object, ...]) -> None:
        began = self._clock()
        self._keep(report_page(self.folder, version=PLACE), seen)
        self._cost = self._clock() - began

    def _keep(self, page: str, seen: tuple[object, ...]) -> None:
        self._seen = seen
        self._written = self._clock()
        content = page.encode("utf-8", "replace")
        self.version = hashlib.sha256(content).hexdigest()[:16]
        self.page = content.replace(PLACE.encode(), self.version.encode(), 1)


def _error_page(error: Exception) -> str:
    return render_page("error.html.jinja", {"error": str(error), "version": PLACE}, connect="'self'")


class _Handler(BaseHTTPRequestHandler):
    timeout = READ_TIMEOUT_S
    server_version = "opd"
    sys_version = ""
    report: LiveReport

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        # A site of somebody else whose name leads to this machine (DNS rebinding) sends its own name.
        name = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if name not in OWN_HOSTS:
            return self._send(HTTPStatus.FORBIDDEN, "text/plain", b"this page is for this machine alone\n", with_body)
        path = urlsplit(self.path).path
        if path not in ("/", "/version"):
            return self._send(HTTPStatus.NOT_FOUND, "text/plain", b"there is / alone\n", with_body)
        version, page = self.report.refresh()
        if path == "/version":
            return self._send(HTTPStatus.OK, "text/plain", version.encode(), with_body)
        return self._send(HTTPStatus.OK, "text/html; charset=utf-8", page, with_body, version)

    def _send(self, status: HTTPStatus, kind: str, body: bytes, with_body: bool, version: str = "") -> None:
        with suppress(ConnectionError, TimeoutError):  # the reader has gone
            self.send_response(status)
            tag = {"ETag": f'"{version}"'} if version else {}
            for name, value in {**HEADERS, **tag, "Content-Type": kind, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a page asks every few seconds."""


def server(folder: Path, port: int = 0) -> ThreadingHTTPServer:
    """A server on loopback whose `serve_forever` serves the report; port 0 takes a free one.

    Raises RunFolderError for a folder without a run, and ConfigError for a port that cannot be had.
    """
    handler = type("Handler", (_Handler,), {"report": LiveReport(folder)})
    try:
        return ThreadingHTTPServer((HOST, port), handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"Port {port} of {HOST} cannot be used: {reason}. Choose another one, or leave --port out, which takes a free one."
        ) from None

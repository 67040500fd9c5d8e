"""The outermost layer: who may ask at all, and the count of what was answered."""

from __future__ import annotations

import hmac
import json
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opd.serving.measures import Measures

OPEN_PATHS = ("/health",)
"""What a load balancer asks without a token."""
KNOWN_PATHS = ("/health", "/metrics", "/v1/model", "/v1/head", "/v1/tokenizer", "/v1/hidden", "/v1/score")


class Guard:
    """Refuses requests without the token, or, where there is none, under another host's name: a page in a browser could otherwise reach
    a server on loopback by a name that it owns."""

    def __init__(self, app: ASGIApp, measures: Measures, *, token: str | None, hosts: Collection[str]) -> None:
        self._app = app
        self._measures = measures
        self._token = None if token is None else token.encode()
        self._hosts = set(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in KNOWN_PATHS else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._measures.requests.labels(path, message["status"]).inc()
            await send(message)

        refusal = None if path in OPEN_PATHS else self._refusal(dict(scope["headers"]))
        if refusal is None:
            await self._app(scope, receive, counted)
            return
        status, reason, message = refusal
        self._measures.refusals.labels(reason).inc()
        body = json.dumps({"error": {"reason": reason, "message": message}}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await counted({"type": "http.response.start", "status": status, "headers": headers})
        await counted({"type": "http.response.body", "body": body})

    def _refusal(self, headers: dict[bytes, bytes]) -> tuple[int, str, str] | None:
        if self._token is not None:
            given = headers.get(b"authorization", b"")
            if hmac.compare_digest(given, b"Bearer " + self._token):
                return None
            message = (
                "This server asks for a token, as 'Authorization: Bearer …'; name its environment variable in teacher.api_key_env."
                if not given
                else "The token is not this server's; compare the environment variables of both sides."
            )
            return 401, "token", message
        name = headers.get(b"host", b"").decode("latin-1").rpartition(":")[0] or headers.get(b"host", b"").decode(
            "latin-1"
        )
        if name.strip("[]") in self._hosts:
            return None
        return (
            403,
            "host",
            "This server listens without a token, for programs of its own machine alone; ask it at 127.0.0.1, or start it with a token.",
        )

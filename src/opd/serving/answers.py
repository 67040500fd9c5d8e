"""Answers on their way: bytes in pieces, so that a slow reader slows nobody else, and what it holds is freed when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from opd.teachers.hidden_wire import CONTENT_TYPE

PIECE_BYTES = 1 << 20


class PiecewiseResponse(Response):
    """A body of known length. Each piece is sent when the client has taken the one before; a client that takes longer than `timeout`
    seconds in all is cut off. `after` is called at the end, however it ends."""

    def __init__(
        self,
        length: int,
        pieces: Iterable[bytes | memoryview],
        *,
        timeout: float,
        after: Callable[[], None] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        own = {"content-length": str(length), **(headers or {})}
        super().__init__(content=None, media_type=CONTENT_TYPE, headers=own)
        self.raw_headers = [(k, v) for k, v in self.raw_headers if (k, v) != (b"content-length", b"0")]
        self._pieces = pieces
        self._timeout = timeout
        self._after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.wait_for(self._send(send), self._timeout)
        finally:
            if self._after is not None:
                self._after()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for piece in self._pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)  # uvicorn waits for the client inside `send` only once its buffer is full
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def sliced(content: bytes) -> Iterator[memoryview]:
    """The content in pieces, without copies."""
    view = memoryview(content)
    for start in range(0, len(view), PIECE_BYTES):
        yield view[start : start + PIECE_BYTES]

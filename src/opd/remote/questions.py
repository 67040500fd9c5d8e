"""A question to a server, its answer, and what is wrong with one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from opd.errors import ServerError
from opd.remote.address import Address

T = TypeVar("T")
MAX_WORDS = 600  # of a server's own words in a message


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is sent. It may be sent again, to another server too, so the answer must not depend on how often it was."""

    path: str
    method: Literal["GET", "POST"] = "POST"
    json: Any = None
    content: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back with a status of success."""

    server: Address
    content: bytes
    headers: Mapping[str, str]

    def json(self) -> Any:
        """The body. Raises BadAnswer for a body that is cut off or no JSON."""
        try:
            return json.loads(self.content)
        except ValueError as error:
            start = self.content[:80].decode("utf-8", "replace")
            raise BadAnswer(f"an answer that is no JSON ({error}); it begins with {start!r}") from None


@dataclass(frozen=True, kw_only=True)
class Question(Generic[T]):
    """A request, and how its answer is read: `read` raises BadAnswer for what may be better the next time, and ServerError to stop.
    One answer is read at a time, in a thread beside the connections."""

    request: Request
    read: Callable[[Answer], T]


class BadAnswer(Exception):
    """An answer that cannot be used. The question is asked again, of another server where there is one, and the run stops where that
    does not help. The text goes on after "it gave"."""


class ChangedAnswer(BadAnswer):
    """An answer of another model than that of the start."""


class RefusedError(ServerError):
    """A server's refusal (4xx), in its own words; asking again would not help."""

    def __init__(self, message: str, status: int, words: str) -> None:
        super().__init__(message)
        self.status = status
        self.words = words


def neighbours(rows: Sequence[T], tokens_of: Callable[[T], int], *, most_rows: int, most_tokens: int) -> list[list[T]]:
    """The rows in order, cut into requests of at most so many rows and tokens each; a longer row has one of its own."""
    groups: list[list[T]] = []
    tokens = 0
    for row in rows:
        length = tokens_of(row)
        if not groups or len(groups[-1]) == most_rows or tokens + length > most_tokens:
            groups.append([])
            tokens = 0
        groups[-1].append(row)
        tokens += length
    return groups


def words_of(content: bytes) -> str:
    """A server's own words about an error, wherever its dialect puts them."""
    text = content.decode("utf-8", "replace").strip()
    try:
        found = json.loads(text)
    except ValueError:
        found = text
    for _ in range(3):  # {"error": {"message": …}}, {"detail": …}, {"message": …}
        if isinstance(found, dict):
            found = next((found[key] for key in ("error", "message", "detail") if found.get(key)), text)
    words = " ".join((found if isinstance(found, str) else json.dumps(found)).split())
    return words[:MAX_WORDS] + ("…" if len(words) > MAX_WORDS else "")

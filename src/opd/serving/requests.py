"""Requests as the server reads them, and the refusals that it answers with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from opd.config.serving import ServeConfig
from opd.serving.frozen import FrozenModel

TokenId = Annotated[int, Field(ge=0, strict=True)]
MAX_ID_LENGTH = 64


class Refusal(Exception):
    """A request that is not answered: what, why, and what to do."""

    def __init__(self, status: int, reason: str, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        """A word for programs and metrics."""
        self.message = message
        self.retry_after = retry_after
        """Seconds."""


class Row(BaseModel):
    """A prompt and a response. Answers are about the positions that predict the response's tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: Annotated[str, Field(min_length=1, max_length=MAX_ID_LENGTH)]
    """The caller's own, which comes back with the answer."""
    prompt: Annotated[list[TokenId], Field(min_length=1)]
    response: Annotated[list[TokenId], Field(min_length=1)]
    positions: list[TokenId] | None = None
    """Places in the response that are wanted, in the order of the answer; None: all of them."""

    @property
    def length(self) -> int:
        """Tokens that the model reads: the last one of the response predicts nothing."""
        return len(self.prompt) + len(self.response) - 1

    @property
    def wanted(self) -> int:
        """Rows of the answer."""
        return len(self.response) if self.positions is None else len(self.positions)


class HiddenRequest(BaseModel):
    """POST /v1/hidden."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    rows: Annotated[list[Row], Field(min_length=1)]
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


class ScoreRequest(BaseModel):
    """POST /v1/score: log-probs over the vocabulary that the client has in common with the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    rows: Annotated[list[Row], Field(min_length=1)]
    top_k: Annotated[int, Field(ge=1, strict=True)] = 1
    vocabulary: Annotated[int, Field(ge=1, strict=True)]
    """Ids at or beyond this have probability 0."""
    masked_ids: list[TokenId] = Field(default_factory=list)
    """Ids below `vocabulary` that have probability 0, too."""


def explain(error: ValidationError) -> Refusal:
    """pydantic's first complaint, in words."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "the body"
    return Refusal(400, "malformed", f"{where}: {first['msg']}. GET /v1/model says what this server takes.")


def check_rows(rows: list[Row], model: FrozenModel, limits: ServeConfig) -> None:
    """Raise Refusal for rows that this model or this server does not take."""
    tokens = tokens_of(rows)
    if len(rows) > limits.max_request_rows:
        raise _too_much(len(rows), "rows", "max_request_rows", limits.max_request_rows)
    if tokens > limits.max_request_tokens:
        raise _too_much(tokens, "tokens", "max_request_tokens", limits.max_request_tokens)
    if len({row.id for row in rows}) < len(rows):
        raise Refusal(400, "ids", "Two rows of one request have the same id; give every row its own.")
    for row in rows:
        _check_row(row, model, limits)


def _check_row(row: Row, model: FrozenModel, limits: ServeConfig) -> None:
    if model.context is not None and row.length > model.context:
        raise Refusal(
            413,
            "context",
            f"Row '{row.id}' has {row.length} tokens, and {model.name} reads {model.context}; shorten prompt or response.",
        )
    if row.length > limits.max_tokens:
        raise Refusal(
            413,
            "row",
            f"Row '{row.id}' has {row.length} tokens, and this server reads {limits.max_tokens} at once; shorten it, or start the "
            f"server with --max-tokens {row.length}.",
        )
    largest = max(max(row.prompt), max(row.response))
    if largest >= model.rows:
        raise Refusal(
            400,
            "vocabulary",
            f"Row '{row.id}' holds the token id {largest}, and {model.name} has {model.rows} embedding rows; the ids are of another "
            "tokenizer.",
        )
    if row.positions is not None and (not row.positions or max(row.positions) >= len(row.response)):
        raise Refusal(
            400,
            "positions",
            f"Row '{row.id}' has {len(row.response)} response tokens; its positions lie from 0 to one less.",
        )


def check_scores(request: ScoreRequest, model: FrozenModel) -> None:
    """Raise Refusal for a vocabulary that the model does not have."""
    size = request.vocabulary
    if size > model.head_rows:
        raise Refusal(
            400,
            "vocabulary",
            f"vocabulary={size} is more than the {model.head_rows} rows of {model.name}'s output layer.",
        )
    if request.top_k > size:
        raise Refusal(400, "top_k", f"top_k={request.top_k} is more than the vocabulary of {size}.")
    if len({i for i in request.masked_ids if i < size}) == size:
        raise Refusal(400, "vocabulary", "masked_ids leave no token of the vocabulary.")


def _too_much(found: int, what: str, option: str, limit: int) -> Refusal:
    flag = f"--{option.replace('_', '-')}"
    return Refusal(
        413,
        what,
        f"{found} {what} in one request, and this server takes {limit}; send several requests, or start it with {flag} {found}.",
    )


def tokens_of(rows: Iterable[Row]) -> int:
    """Tokens that the model reads."""
    return sum(row.length for row in rows)

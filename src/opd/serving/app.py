"""The HTTP interface: what each path takes and gives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import torch
from fastapi import FastAPI, Request
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp
from torch import Tensor

from opd.config.serving import ServeConfig
from opd.kernels import linear_top_k, top_k_of
from opd.losses import to_logp
from opd.serving.answers import PiecewiseResponse, sliced
from opd.serving.batcher import Batcher, Finish, Place
from opd.serving.frozen import FrozenModel
from opd.serving.guard import Guard
from opd.serving.measures import Measures
from opd.serving.requests import HiddenRequest, Refusal, Row, ScoreRequest, check_rows, check_scores, explain
from opd.teachers.hidden_wire import Receipt, digest_of, stream, write_answer
from opd.teachers.local import mask_vocabulary
from opd.teachers.vocabulary import VocabularyMatch

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
Asked = TypeVar("Asked", bound=BaseModel)


class ClientGone(Exception):
    """The client left before its answer."""


class TeacherService:
    """What the paths share: the model, its queue, and the limits."""

    def __init__(self, model: FrozenModel, limits: ServeConfig) -> None:
        self.model = model
        self.limits = limits
        self.measures = Measures()
        self.batcher = Batcher(
            model, self.measures, batch_tokens=limits.max_tokens, queue_tokens=limits.max_queue_tokens
        )

    @asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        """The queue is read for as long as the server runs."""
        reading = asyncio.create_task(self.batcher.run())
        try:
            yield
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def read(self, request: Request, kind: type[Asked]) -> Asked:
        """The request's body, of at most the allowed size, within the allowed time. Raises Refusal."""
        if not request.headers.get("content-type", "").startswith("application/json"):
            raise Refusal(415, "type", "The body has to be JSON, with 'Content-Type: application/json'.")
        try:
            content = await asyncio.wait_for(self._content(request), self.limits.timeout)
        except asyncio.TimeoutError:
            raise Refusal(408, "slow", f"The request took more than {self.limits.timeout:g} s to arrive.") from None
        try:
            return await asyncio.to_thread(kind.model_validate_json, content)
        except ValidationError as error:
            raise explain(error) from None

    async def _content(self, request: Request) -> bytes:
        limit = self.limits.max_body_mb << 20
        said = request.headers.get("content-length", "")
        if said.isdigit() and int(said) > limit:
            raise self._too_large(int(said))
        found = bytearray()
        async for piece in request.stream():
            found += piece
            if len(found) > limit:
                raise self._too_large(len(found))
        return bytes(found)

    def _too_large(self, size: int) -> Refusal:
        return Refusal(
            413,
            "body",
            f"The request has {size} bytes or more, and this server takes {self.limits.max_body_mb} MiB; send fewer "
            "rows at once, or start it with a larger --max-body-mb.",
        )

    async def results(self, request: Request, rows: Sequence[Row], finish: Finish) -> tuple[list[Any], Place]:
        """Every row's result in order, and the place to release when the answer has been taken. Raises Refusal, and ClientGone, which
        frees the place."""
        place = self.batcher.admit(rows)
        try:
            with self.batcher.queued(rows, finish) as answers:
                done, gone = asyncio.gather(*answers), asyncio.create_task(_disconnected(request))
                try:
                    await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
                    if not done.done():
                        raise ClientGone
                    return list(await done), place
                finally:
                    gone.cancel()
                    done.cancel()
        except BaseException:
            place.release()
            raise

    def answer(self, rows: Sequence[Row], tensors: dict[str, Tensor]) -> bytes:
        receipts = [
            Receipt(id=row.id, digest=digest_of(row.prompt, row.response, row.positions), tokens=row.wanted)
            for row in rows
        ]
        return write_answer(tensors, receipts, self.model.identity)

    async def respond(
        self,
        rows: Sequence[Row],
        results: Sequence[Any],
        place: Place,
        join: Callable[[Sequence[Any]], dict[str, Tensor]],
    ) -> Response:
        """The answer with a receipt for each row; its place is free when the client has taken it."""
        try:
            content = await asyncio.to_thread(lambda: self.answer(rows, join(results)))
            return PiecewiseResponse(len(content), sliced(content), timeout=self.limits.timeout, after=place.release)
        except BaseException:
            place.release()
            raise


async def _disconnected(request: Request) -> None:
    """Return when the client has gone. The body has been read, so nothing else can arrive."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def make_app(model: FrozenModel, limits: ServeConfig, *, token: str | None = None) -> ASGIApp:
    """The application. With `token`, every path but /health asks for it."""
    service = TeacherService(model, limits)
    app = FastAPI(lifespan=service.lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(Refusal, lambda request, error: _refused(service, error))
    app.add_exception_handler(HTTPException, lambda request, error: _not_found(error))
    app.add_exception_handler(ClientGone, lambda request, error: _gone(service))
    _facts(app, service)
    _asking(app, service)
    guarded = Guard(app, service.measures, token=token, hosts=(*LOCAL_NAMES, limits.host))
    guarded.service = service  # pyright: ignore[reportAttributeAccessIssue]
    return guarded


def _facts(app: FastAPI, service: TeacherService) -> None:
    """The paths that describe the model."""
    model = service.model
    description = model.description(service.limits)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.measures.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/model")
    async def about() -> dict[str, Any]:
        return description

    @app.get("/v1/head")
    async def head() -> Response:
        if model.head is None:
            raise Refusal(409, "hidden", description["hidden_reason"])
        facts = {"identity": model.identity, "valid_rows": str(description["valid_rows"])}
        length, pieces = stream(model.head_tensors, facts)
        return PiecewiseResponse(length, pieces, timeout=service.limits.timeout)

    @app.get("/v1/tokenizer")
    async def tokenizer() -> Response:
        files = {
            path: torch.frombuffer(bytearray(content), dtype=torch.uint8)
            for path, content in model.tokenizer_files.items()
            if content
        }
        content = write_answer(files, [], model.identity)
        return PiecewiseResponse(len(content), sliced(content), timeout=service.limits.timeout)


def _asking(app: FastAPI, service: TeacherService) -> None:
    """The paths that run the model."""
    model = service.model

    @app.post("/v1/hidden")
    async def hidden(request: Request) -> Response:
        asked = await service.read(request, HiddenRequest)
        if model.head is None:
            raise Refusal(409, "hidden", str(model.description(service.limits)["hidden_reason"]))
        check_rows(asked.rows, model, service.limits)
        dtype = getattr(torch, asked.dtype)
        results, place = await service.results(request, asked.rows, lambda row, out: _wanted(row, out, dtype))
        return await service.respond(asked.rows, results, place, lambda found: {"hidden": torch.cat(list(found))})

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        asked = await service.read(request, ScoreRequest)
        check_rows(asked.rows, model, service.limits)
        check_scores(asked, model)
        common = VocabularyMatch(size=asked.vocabulary, invalid_ids=tuple(sorted(set(asked.masked_ids))))
        results, place = await service.results(
            request, asked.rows, lambda row, out: _scores(row, out, model, common, asked.top_k)
        )
        return await service.respond(asked.rows, results, place, _joined)


def _wanted(row: Row, output: Tensor, dtype: torch.dtype) -> Tensor:
    """The wanted positions, in the type of the wire, on the CPU. Raises Refusal for numbers that are not finite."""
    chosen = (output if row.positions is None else output[row.positions]).to(dtype)
    if not bool(chosen.isfinite().all()):
        raise Refusal(
            500,
            "finite",
            f"The hidden states of row '{row.id}' are NaN or infinite as {str(dtype).removeprefix('torch.')}; start the server with another "
            "--dtype, or use another checkpoint.",
        )
    return chosen.cpu()


def _scores(row: Row, output: Tensor, model: FrozenModel, common: VocabularyMatch, k: int) -> dict[str, Tensor]:
    """Top-k log-probs and the response tokens' own, as a local teacher computes them."""
    ids = common.with_stand_ins(torch.tensor(row.response, device=output.device))
    if row.positions is not None:
        output, ids = output[row.positions], ids[row.positions]
    if model.head is None:
        top = top_k_of(to_logp(mask_vocabulary(output, common)), ids, k)
    else:
        top = linear_top_k(output, model.head, ids, k, valid_vocab=common.size, masked_ids=common.invalid_ids)
    assert top.sampled_logp is not None
    if bool(top.sampled_logp.isnan().any()) or bool(top.teacher_logp.isnan().any()):
        raise Refusal(
            500,
            "finite",
            f"The log-probs of row '{row.id}' are NaN; start the server with another --dtype, or use another checkpoint.",
        )
    return {"ids": top.ids.int().cpu(), "logp": top.teacher_logp.cpu(), "sampled_logp": top.sampled_logp.cpu()}


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _refused(service: TeacherService, error: Any) -> JSONResponse:
    service.measures.refusals.labels(error.reason).inc()
    headers = None if error.retry_after is None else {"retry-after": str(error.retry_after)}
    body = {"error": {"reason": error.reason, "message": error.message}}
    return JSONResponse(body, status_code=error.status, headers=headers)


def _not_found(error: Any) -> JSONResponse:
    message = f"{error.detail}. opd serve-teacher has /health, /metrics, /v1/model, /v1/head, /v1/tokenizer, /v1/hidden and /v1/score."
    return JSONResponse({"error": {"reason": "path", "message": message}}, status_code=error.status_code)


def _gone(service: TeacherService) -> Response:
    service.measures.gone.inc()
    return Response(status_code=499)  # nobody reads it

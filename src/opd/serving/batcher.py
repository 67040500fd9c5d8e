"""Rows of all waiting requests, read together: grouped by length within a token budget, the one that waits longest among them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from opd.data.pack import group_by_length
from opd.serving.frozen import FrozenModel
from opd.serving.measures import Measures
from opd.serving.requests import Refusal, Row, tokens_of

WINDOW = 16
"""Batches' worth of waiting rows that are grouped at a time: enough for rows of like length, and nobody overtaken for long."""
SLOWEST_RATE = 1000.0  # tokens a second, until a forward pass has been timed
LONGEST_WAIT = 60  # seconds that a refused client is told to wait at most

Finish = Callable[[Row, Tensor], Any]
"""What the request wants, made of a row's hidden states (or logits), on the model's thread."""


@dataclass(eq=False)
class _Waiting:
    row: Row
    finish: Finish
    answer: asyncio.Future[Any]


class Place:
    """The tokens that a request holds of the queue, from its admission until its answer has been taken."""

    def __init__(self, batcher: Batcher, tokens: int) -> None:
        self._batcher = batcher
        self._tokens = tokens

    def release(self) -> None:
        """Free the tokens; once more does nothing."""
        self._batcher.held_tokens -= self._tokens
        self._tokens = 0
        self._batcher.show()


class Batcher:
    """One model, one thread, one queue. Everything but the forward pass happens on the event loop, so nothing is locked."""

    def __init__(self, model: FrozenModel, measures: Measures, *, batch_tokens: int, queue_tokens: int) -> None:
        self.model = model
        self.measures = measures
        self.batch_tokens = batch_tokens
        self.queue_tokens = queue_tokens
        self.held_tokens = 0
        self._waiting: list[_Waiting] = []
        self._arrived = asyncio.Event()
        self._rate = SLOWEST_RATE
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="opd-forward")

    def admit(self, rows: Sequence[Row]) -> Place:
        """A place in the queue. Raises Refusal where it is full."""
        tokens = tokens_of(rows)
        if self.held_tokens and self.held_tokens + tokens > self.queue_tokens:
            wait = min(LONGEST_WAIT, max(1, round(self.held_tokens / self._rate)))
            raise Refusal(
                429,
                "queue",
                f"{self.held_tokens} tokens wait already, and with these {tokens} there would be more than {self.queue_tokens}. Try "
                f"again in {wait} s, send fewer requests at once (teacher.concurrency), or start the server with a larger "
                "--max-queue-tokens.",
                retry_after=wait,
            )
        self.held_tokens += tokens
        self.show()
        return Place(self, tokens)

    @contextmanager
    def queued(self, rows: Sequence[Row], finish: Finish) -> Iterator[list[asyncio.Future[Any]]]:
        """The rows' answers to come. Rows that are still waiting when the block ends, because the client has gone, leave the queue."""
        loop = asyncio.get_running_loop()
        mine = [_Waiting(row, finish, loop.create_future()) for row in rows]
        self._waiting += mine
        self._arrived.set()
        self.show()
        try:
            yield [one.answer for one in mine]
        finally:
            for one in mine:
                one.answer.cancel()  # does nothing to one that is there
            self._waiting = [one for one in self._waiting if not one.answer.cancelled()]
            self.show()

    async def run(self) -> None:
        """Read what waits, until cancelled."""
        try:
            while True:
                await self._arrived.wait()
                group = self._next_group()
                if group:
                    await self._read(group)
                else:
                    self._arrived.clear()
        finally:
            self._thread.shutdown(wait=True)

    def _next_group(self) -> list[_Waiting]:
        """The rows to read now: of groups of like length, the one that holds the row that waits longest. They leave the queue."""
        window: list[_Waiting] = []
        tokens = 0
        for one in self._waiting:
            if window and tokens + one.row.length > WINDOW * self.batch_tokens:
                break
            window.append(one)
            tokens += one.row.length
        lengths = [one.row.length for one in window]
        groups = group_by_length(lengths, budget=self.batch_tokens, layout="right_padded")
        members = next((group for group in groups if 0 in group), [])
        chosen = {id(window[i]) for i in members}
        self._waiting = [one for one in self._waiting if id(one) not in chosen]
        self.show()
        return [window[i] for i in members]

    async def _read(self, group: Sequence[_Waiting]) -> None:
        loop = asyncio.get_running_loop()
        try:
            answers = await loop.run_in_executor(self._thread, self._forward, group)
        except (
            Exception
        ) as error:  # of the model, whatever it is: every row of the batch is told, and the server goes on
            refusal = _failed(error, sum(one.row.length for one in group), self.batch_tokens)
            for one in group:
                if not one.answer.done():
                    one.answer.set_exception(refusal)
            return
        for one, answer in zip(group, answers, strict=True):
            if one.answer.done():
                continue  # its client has gone
            if isinstance(answer, Refusal):
                one.answer.set_exception(answer)
            else:
                one.answer.set_result(answer)

    def _forward(self, group: Sequence[_Waiting]) -> list[Any]:
        began = time.perf_counter()
        outputs = self.model.outputs([one.row.prompt for one in group], [one.row.response for one in group])
        answers = [_finished(one, output) for one, output in zip(group, outputs, strict=True)]
        seconds, tokens = time.perf_counter() - began, tokens_of(one.row for one in group)
        self._rate = tokens / max(seconds, 1e-6)
        self.measures.forward(seconds, len(group), tokens)
        return answers

    def show(self) -> None:
        """Bring the gauges up to date."""
        self.measures.queue_rows.set(len(self._waiting))
        self.measures.queue_tokens.set(self.held_tokens)


def _finished(one: _Waiting, output: Tensor) -> Any:
    """The row's answer, or the refusal that is about this row alone."""
    try:
        return one.finish(one.row, output)
    except Refusal as refusal:
        return refusal


def _failed(error: Exception, tokens: int, budget: int) -> Refusal:
    if "out of memory" in str(error) or "allocate" in str(error):
        return Refusal(
            500,
            "memory",
            f"A forward pass of {tokens} tokens did not fit in memory; start the server with --max-tokens below {budget}.",
        )
    return Refusal(500, "forward", f"The forward pass failed: {type(error).__name__}: {str(error)[:300]}")

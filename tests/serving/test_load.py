"""Many clients at once: nothing is lost, nothing is mixed up, and nobody waits for the slow one."""

from __future__ import annotations

import asyncio
import copy
import random
from typing import Any

import httpx
import pytest
import torch

from served import Running, expected_hidden, freeze_model, read_rows, row, serving, teacher_model, watched

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

CLIENTS = 64
REQUESTS = 4
"""Of each client, one after the other."""


def rounding(model: Any) -> float:
    """How far float32 moves hidden states on this machine: of the first clients' rows, each alone, from float64."""
    exact = copy.deepcopy(model).double()
    rows = [one for number in range(8) for rows in requests_of(number) for one in rows]
    return max(float((expected_hidden(model, one) - expected_hidden(exact, one)).abs().max()) for one in rows)


def requests_of(client: int) -> list[list[dict[str, Any]]]:
    """1 to 5 rows of 2 to 64 tokens a request."""
    chance = random.Random(client)
    found, index = [], 1000 * client
    for _ in range(REQUESTS):
        rows = []
        for _ in range(chance.randint(1, 5)):
            prompt = chance.randint(1, 40)
            rows.append(row(index, prompt, chance.randint(1, 64 - prompt)))
            index += 1
        found.append(rows)
    return found


async def usual(client: httpx.AsyncClient, number: int) -> list[tuple[dict[str, Any], torch.Tensor]]:
    pairs = []
    for rows in requests_of(number):
        answer = await client.post("/v1/hidden", json={"rows": rows, "dtype": "float32"})
        while answer.status_code == 429:
            await asyncio.sleep(0.05)
            answer = await client.post("/v1/hidden", json={"rows": rows, "dtype": "float32"})
        assert answer.status_code == 200, answer.text
        pairs += zip(rows, read_rows(answer.content, rows), strict=True)
    return pairs


async def slow(client: httpx.AsyncClient) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """Takes its answer a little at a time."""
    rows = [row(-1 - i, 2, 62) for i in range(32)]
    while True:
        async with client.stream("POST", "/v1/hidden", json={"rows": rows, "dtype": "float32"}) as answer:
            content = b""
            async for part in answer.aiter_raw(4096):
                content += part
                await asyncio.sleep(0.02)
        if answer.status_code != 429:  # the queue was full
            return list(zip(rows, read_rows(content, rows), strict=True))
        await asyncio.sleep(0.05)


async def leaving(client: httpx.AsyncClient, times: int) -> int:
    """Goes away again and again before its answer."""
    left = 0
    for i in range(times):
        post = client.post("/v1/hidden", json={"rows": [row(-1000 - i, 30, 30)] * 1, "dtype": "float32"})
        try:
            await asyncio.wait_for(post, 0.01 * random.Random(i).random())
        except asyncio.TimeoutError:
            left += 1
    return left


async def crowd(url: str) -> tuple[list[tuple[dict[str, Any], torch.Tensor]], int]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False, limits=limits) as client:
        everyone = await asyncio.gather(
            slow(client), leaving(client, 20), *(usual(client, number) for number in range(CLIENTS))
        )
    pairs: list[Any] = [pair for part in everyone if isinstance(part, list) for pair in part]
    return pairs, next(part for part in everyone if isinstance(part, int))


def run_crowd(server: Running) -> tuple[list[tuple[dict[str, Any], torch.Tensor]], int]:
    pairs, left = asyncio.run(crowd(server.url))
    server.wait_for(lambda: server.metric("opd_queue_tokens") == 0)
    assert server.metric("opd_queue_rows") == 0
    return pairs, left


def test_64_clients_get_their_own_answers_whatever_one_slow_and_one_leaving_client_do():
    """2,000 tokens of queue make some of them wait and come back; each answer is compared with a local teacher's."""
    model = teacher_model()
    served = watched(freeze_model(model))
    with serving(served, max_tokens=512, max_queue_tokens=4000) as server:
        pairs, left = run_crowd(server)
        refused = server.metric("opd_refusals_total", reason="queue")
    expected = sum(len(rows) for number in range(CLIENTS) for rows in requests_of(number)) + 32
    assert len(pairs) == expected == len({one["id"] for one, _ in pairs})
    worst = max(float((hidden - expected_hidden(model, one)).abs().max()) for one, hidden in pairs)
    assert worst <= 4 * rounding(model) < 1e-4, "two readings in float32, and another row differs by about 1"
    assert left > 0
    assert refused > 0
    assert max(map(len, served.batches)) > 5, "rows of several clients share a batch"


def test_a_slow_reader_delays_nobody():
    """Eight MiB for a reader that takes nothing yet, and small questions that are answered meanwhile."""
    model = freeze_model(teacher_model(hidden=512, max_positions=512))
    rows = [row(i, 2, 256) for i in range(16)]

    async def questions(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
            async with client.stream("POST", "/v1/hidden", json={"rows": rows, "dtype": "float32"}) as slow_answer:
                for i in range(10):
                    answer = await client.post("/v1/hidden", json={"rows": [row(i, 3, 3)]})
                    assert answer.status_code == 200
                content = await slow_answer.aread()
            read_rows(content, rows)

    with serving(model) as server:
        asyncio.run(questions(server.url))

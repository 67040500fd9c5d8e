"""Every limit refuses with a status, a reason, and words that say what to do; and what is refused or left frees its place."""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from served import Running, ask_hidden, freeze_model, row, serving, teacher_model, watched

pytestmark = pytest.mark.timeout(120)

TOKEN = "correct-horse-battery-staple"
ROWS = [row(i, 3, 4) for i in range(4)]


@pytest.fixture(scope="module")
def model() -> Any:
    return freeze_model(teacher_model())


def refusal(answer: httpx.Response) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status_code, error["reason"], error["message"]


@pytest.mark.parametrize(
    ("limits", "rows", "status", "reason", "advice"),
    [
        ({"max_request_rows": 3}, ROWS, 413, "rows", "--max-request-rows 4"),
        ({"max_request_tokens": 20}, ROWS, 413, "tokens", "--max-request-tokens 24"),
        ({"max_tokens": 5}, ROWS, 413, "row", "--max-tokens 6"),
        ({}, [row(1, 60, 6)], 413, "context", "reads 64; shorten"),
        ({}, [{"id": "a", "prompt": [13], "response": [1]}], 400, "vocabulary", "the token id 13"),
        ({}, [row(1, 2, 3, positions=[3])], 400, "positions", "from 0 to one less"),
        ({}, [row(1, 2, 3, positions=[])], 400, "positions", "from 0 to one less"),
        ({}, [ROWS[0], ROWS[0]], 400, "ids", "the same id"),
        ({}, [{"id": "a", "prompt": [], "response": [1]}], 400, "malformed", "rows.0.prompt"),
        ({}, [{"id": "a", "prompt": [1], "response": [-1]}], 400, "malformed", "rows.0.response.0"),
        ({}, [{"id": "a", "prompt": [1], "response": [True]}], 400, "malformed", "rows.0.response.0"),
        ({}, [{"id": "a", "prompt": [1], "response": [1], "extra": 1}], 400, "malformed", "rows.0.extra"),
        ({}, [{"id": "a" * 65, "prompt": [1], "response": [1]}], 400, "malformed", "rows.0.id"),
        ({}, [], 400, "malformed", "rows"),
    ],
)
def test_a_request_beyond_a_limit_is_refused_with_advice(
    model: Any, limits: dict[str, int], rows: list[Any], status: int, reason: str, advice: str
):
    with serving(model, **limits) as server:
        assert refusal(ask_hidden(server.url, rows))[:2] == (status, reason)
        assert advice in refusal(ask_hidden(server.url, rows))[2]
        assert server.metric("opd_refusals_total", reason=reason) == 2
        assert server.service.batcher.held_tokens == 0
        assert ask_hidden(server.url, [{"id": "a", "prompt": [1], "response": [1]}]).status_code == 200


def test_the_advice_of_a_refusal_is_followed_to_the_letter(model: Any):
    for limits in ({"max_request_rows": 4}, {"max_request_tokens": 24}, {"max_tokens": 6}):
        with serving(model, **limits) as server:
            assert ask_hidden(server.url, ROWS).status_code == 200


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large_is_refused_before_it_is_read_whole(model: Any, announced: bool):
    size = (1 << 20) + 1

    def pieces() -> Any:
        for _ in range(0, size, 1024):
            yield b" " * 1024

    with serving(model, max_body_mb=1) as server, httpx.Client(trust_env=False) as client:
        content: Any = b" " * size if announced else pieces()
        answer = client.post(f"{server.url}/v1/hidden", content=content, headers={"content-type": "application/json"})
    assert refusal(answer)[:2] == (413, "body")
    assert "--max-body-mb" in refusal(answer)[2]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"rows": 3}', b"\xff\xfe", b'{"rows": [{"id": 1}]}'])
def test_a_body_that_is_no_request_is_refused(model: Any, body: bytes):
    with serving(model) as server:
        headers = {"content-type": "application/json"}
        answer = httpx.post(f"{server.url}/v1/hidden", content=body, headers=headers, trust_env=False)
    assert refusal(answer)[:2] == (400, "malformed")


def test_text_that_a_web_page_could_send_is_refused(model: Any):
    with serving(model) as server:
        answer = httpx.post(
            f"{server.url}/v1/hidden", content=b"{}", headers={"content-type": "text/plain"}, trust_env=False
        )
    assert refusal(answer)[:2] == (415, "type")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"vocabulary": 14}, "vocabulary"),
        ({"vocabulary": 5, "top_k": 6}, "top_k"),
        ({"vocabulary": 2, "masked_ids": [0, 1]}, "vocabulary"),
        ({}, "malformed"),
    ],
)
def test_scores_that_cannot_be_are_refused(model: Any, body: dict[str, Any], reason: str):
    with serving(model) as server:
        answer = httpx.post(f"{server.url}/v1/score", json={"rows": ROWS, **body}, trust_env=False)
    assert refusal(answer)[:2] == (400, reason)


def test_a_full_queue_says_when_to_come_back(model: Any):
    slow = watched(model, closed=True)
    with serving(slow, max_queue_tokens=30) as server, ThreadPoolExecutor(1) as threads:
        first = threads.submit(ask_hidden, server.url, ROWS)
        server.wait_for(lambda: server.metric("opd_queue_tokens") == 24)
        answer = ask_hidden(server.url, ROWS)
        assert refusal(answer)[:2] == (429, "queue")
        assert int(answer.headers["retry-after"]) >= 1
        slow.gate.set()
        assert first.result().status_code == 200
        assert ask_hidden(server.url, ROWS).status_code == 200


def test_a_request_larger_than_the_queue_is_read_when_it_is_alone(model: Any):
    with serving(model, max_queue_tokens=1) as server:
        assert ask_hidden(server.url, ROWS).status_code == 200


def test_a_client_that_disconnects_frees_its_place(model: Any):
    slow = watched(model, closed=True)
    with serving(slow) as server, ThreadPoolExecutor(1) as threads:
        first = threads.submit(ask_hidden, server.url, ROWS[:1])
        server.wait_for(lambda: server.metric("opd_queue_tokens") == 6 and not server.service.batcher._waiting)

        async def leave() -> None:
            async with httpx.AsyncClient(trust_env=False) as client:
                post = client.post(f"{server.url}/v1/hidden", json={"rows": ROWS[1:]})
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(post, 0.3)

        asyncio.run(leave())
        server.wait_for(lambda: server.metric("opd_clients_gone_total") == 1)
        assert server.metric("opd_queue_tokens") == 6
        assert server.metric("opd_queue_rows") == 0
        slow.gate.set()
        assert first.result().status_code == 200
    assert slow.batches == [[tuple(ROWS[0]["prompt"])]]


def test_a_request_that_trickles_in_is_cut_off(model: Any):
    with serving(model, timeout=0.3) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as raw:
            head = f"POST /v1/hidden HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n"
            raw.sendall(head.encode() + b'{"rows"')
            assert b" 408 " in raw.recv(4096)


def large_answer() -> tuple[Any, list[dict[str, Any]]]:
    """Eight MiB of hidden states: more than the sockets between hold."""
    return freeze_model(teacher_model(hidden=1024, max_positions=512)), [row(i, 2, 256) for i in range(8)]


def test_an_answer_that_nobody_takes_is_cut_off_and_frees_its_place():
    model, rows = large_answer()
    with serving(model, timeout=1.0) as server:
        body = httpx.Request("POST", server.url, json={"rows": rows, "dtype": "float32"}).content
        head = f"POST /v1/hidden HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20) as raw:
            raw.sendall(head.encode() + body)
            server.wait_for(lambda: server.metric("opd_requests_total", path="/v1/hidden", status="200") == 1)
            assert server.metric("opd_queue_tokens") > 0
            assert ask_hidden(server.url, ROWS).status_code == 200
            server.wait_for(lambda: server.metric("opd_queue_tokens") == 0)


def with_token(server: Running, path: str, token: str | None) -> httpx.Response:
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    return httpx.get(f"{server.url}{path}", headers=headers, trust_env=False)


@pytest.mark.parametrize("path", ["/v1/model", "/v1/head", "/v1/tokenizer", "/metrics", "/v1/hidden", "/elsewhere"])
@pytest.mark.parametrize("token", [None, "wrong-horse", TOKEN[:-1], TOKEN + "x"])
def test_a_wrong_token_opens_nothing(model: Any, path: str, token: str | None, capfd: pytest.CaptureFixture[str]):
    with serving(model, token=TOKEN) as server:
        answer = with_token(server, path, token)
        assert answer.status_code == 401
        assert refusal(answer)[1] == "token"
        assert with_token(server, "/v1/model", TOKEN).status_code == 200
        assert with_token(server, "/health", None).status_code == 200
    said = "".join(capfd.readouterr())
    assert TOKEN not in said + answer.text
    assert token is None or token not in said + answer.text


def test_a_name_that_a_web_page_owns_does_not_reach_a_server_without_a_token(model: Any):
    with serving(model) as server:
        for host in ("evil.example", "evil.example:8790", ""):
            answer = httpx.get(f"{server.url}/v1/head", headers={"host": host}, trust_env=False)
            assert answer.status_code in (400, 403)
        assert httpx.get(f"{server.url}/v1/head", headers={"host": "localhost"}, trust_env=False).status_code == 200


def test_a_forward_pass_that_fails_is_told_and_the_next_one_works(model: Any):
    failing = watched(model)
    outputs = failing.model.forward
    failing.model.forward = lambda *_, **__: (_ for _ in ()).throw(RuntimeError("CUDA out of memory. Tried 3 GiB"))
    try:
        with serving(failing) as server:
            answer = ask_hidden(server.url, ROWS)
            assert refusal(answer)[:2] == (500, "memory")
            assert "--max-tokens" in refusal(answer)[2]
            failing.model.forward = outputs
            assert ask_hidden(server.url, ROWS).status_code == 200
            server.wait_for(lambda: server.service.batcher.held_tokens == 0)  # a place is free once the answer has gone
    finally:
        failing.model.forward = outputs


def test_the_metrics_count_what_was_read(model: Any):
    with serving(model) as server:
        ask_hidden(server.url, ROWS)
        ask_hidden(server.url, ROWS[:1])
        server.wait_for(lambda: server.service.batcher.held_tokens == 0)
        text = httpx.get(f"{server.url}/metrics", trust_env=False).text
    assert "opd_rows_total 5.0" in text
    assert "opd_tokens_total 30.0" in text
    assert 'opd_requests_total{path="/v1/hidden",status="200"} 2.0' in text
    assert "opd_forward_seconds_count 2.0" in text
    assert "opd_queue_tokens 0.0" in text

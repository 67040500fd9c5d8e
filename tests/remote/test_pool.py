"""The pool asks again what may be better the next time, stops at what will not, and never mixes answers up."""

from __future__ import annotations

import copy
import logging
import pickle
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from opd.errors import ConfigError, ServerError
from opd.remote.address import parse_address, parse_addresses
from opd.remote.breaker import Patience
from opd.remote.keys import read_key
from opd.remote.pool import SHORTEST_TRY_S, ServerPool, _Tries
from opd.remote.questions import Answer, BadAnswer, Question, RefusedError, Request
from remote.scripted import Asked, Reply, ScriptedServer, free_port, serving

QUICK = Patience(first_wait=0.005, longest_wait=0.02, first_rest=0.05, longest_rest=0.2)


def doubled(asked: Asked) -> Reply:
    return Reply(body={"x": 2 * asked.body["x"]})


def question(x: int = 1, read: Callable[[Answer], Any] = lambda answer: answer.json()["x"]) -> Question[Any]:
    return Question(request=Request(path="/double", json={"x": x}), read=read)


@pytest.fixture
def pool():
    made: list[ServerPool] = []

    def make(*urls: str, **options: Any) -> ServerPool:
        made.append(
            ServerPool(urls, section="teacher", **{"patience": QUICK, "timeout": 2.0, "deadline": 10.0} | options)
        )
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_answers_come_in_the_order_of_the_questions(pool):
    def late_first(asked: Asked) -> Reply:
        return Reply(body={"x": 2 * asked.body["x"]}, delay=random.Random(asked.body["x"]).uniform(0, 0.03))

    with serving(late_first, late_first) as servers:
        asking = pool(*(s.url for s in servers), concurrency=8)
        assert asking.ask_all([question(x) for x in range(60)]) == [2 * x for x in range(60)]
        assert all(len(s.asked) >= 20 for s in servers)


def test_no_more_questions_are_under_way_than_the_concurrency(pool):
    with serving(lambda asked: Reply(body={"x": 0}, delay=0.02)) as (server,):
        pool(server.url, concurrency=3).ask_all([question(x) for x in range(20)])
        assert server.most_open == 3


FAULTS: dict[str, Callable[[Asked], Reply | None]] = {
    "500": lambda asked: Reply(status=500, body=b"engine died"),
    "502": lambda asked: Reply(status=502),
    "503": lambda asked: Reply(status=503, headers={"retry-after": "0"}),
    "429": lambda asked: Reply(status=429, headers={"retry-after": "0.05"}),
    "408": lambda asked: Reply(status=408),
    "hangs up": lambda asked: None,
    "cut off": lambda asked: Reply(body={"x": 2 * asked.body["x"]}, cut=4),
    "no JSON": lambda asked: Reply(body=b"<html>"),
    "slow": lambda asked: Reply(body={"x": 2}, delay=0.6),
    "drips": lambda asked: Reply(body={"x": 2}, drip=0.2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_is_asked_again(pool, fault: str):
    def once(asked: Asked) -> Reply | None:
        return FAULTS[fault](asked) if asked.number == 0 else doubled(asked)

    with serving(once) as (server,):
        assert pool(server.url, timeout=0.3).ask(question(21)) == 42
        assert len(server.asked) == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lasting_fault_ends_in_an_error_that_names_the_server_and_the_fault(pool, fault: str):
    with serving(FAULTS[fault]) as (server,):
        began = time.monotonic()
        with pytest.raises(ServerError) as raised:
            pool(server.url, timeout=0.2, deadline=1.0).ask(question())
    assert time.monotonic() - began < 3.0
    said = str(raised.value)
    assert server.url in said and "teacher.url" in said
    shown = {"500": "engine died", "slow": "teacher.timeout=0.2", "drips": "teacher.timeout", "no JSON": "<html>"}
    assert shown.get(fault, "") in said


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 301, 501])
def test_a_refusal_is_an_error_at_once_in_the_servers_own_words(pool, status: int):
    with serving(lambda asked: Reply(status=status, body={"error": {"message": "k is too large"}})) as (server,):
        with pytest.raises(RefusedError, match=f"status {status} .k is too large") as raised:
            pool(server.url).ask(question())
        assert len(server.asked) == 1 and raised.value.status == status


def test_an_answer_that_cannot_be_used_is_asked_of_another_server(pool):
    def read(answer: Answer) -> int:
        if answer.json()["x"] < 0:
            raise BadAnswer("a negative number")
        return answer.json()["x"]

    with serving(lambda asked: Reply(body={"x": -1}), doubled) as servers:
        asking = pool(*(s.url for s in servers))
        assert asking.ask_all([question(x, read) for x in range(1, 30)]) == [2 * x for x in range(1, 30)]
    with (
        serving(lambda asked: Reply(body={"x": -1})) as (server,),
        pytest.raises(ServerError, match=r"in 6 tries.*it gave a negative number"),
    ):
        pool(server.url).ask(question(1, read))


def test_a_fault_of_the_reader_is_not_taken_for_one_of_the_server(pool):
    with serving(doubled) as (server,), pytest.raises(KeyError, match="nothing"):
        pool(server.url).ask(question(1, lambda answer: answer.json()["nothing"]))


def test_a_failing_server_rests_and_comes_back(pool):
    down = threading.Event()
    down.set()

    def unsteady(asked: Asked) -> Reply:
        return Reply(status=500) if down.is_set() else doubled(asked)

    with serving(unsteady, doubled) as (ill, well):
        rested = Patience(first_wait=0.005, longest_wait=0.02, first_rest=0.5, longest_rest=0.5)
        asking = pool(ill.url, well.url, concurrency=1, patience=rested)
        asking.ask_all([question(x) for x in range(40)])
        assert len(ill.asked) < 10 and len(well.asked) == 40, "it was asked on and on"
        down.clear()
        time.sleep(0.6)
        before = len(ill.asked)
        asking.ask_all([question(x) for x in range(40)])
        assert len(ill.asked) - before > 10, "it did not come back"


def test_a_server_that_starts_late_or_starts_again_is_waited_for(pool):
    port = free_port()
    late = ScriptedServer.__new__(ScriptedServer)

    def start() -> None:
        time.sleep(0.5)
        late.__init__(doubled, port)
        late.start()

    thread = threading.Thread(target=start)
    thread.start()
    assert pool(f"http://127.0.0.1:{port}").ask(question(4)) == 8
    thread.join()
    late.stop()


def test_a_pool_that_is_gone_stops_everything_at_once_after_its_deadline(pool):
    asking = pool(f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}", deadline=0.6, concurrency=2)
    began = time.monotonic()
    with pytest.raises(ServerError, match=r"no usable answer.*curl http"):
        asking.ask_all([question(x) for x in range(50)])
    assert time.monotonic() - began < 2.0
    began = time.monotonic()
    with pytest.raises(ServerError, match=r"for 0\.6 s"):
        asking.ask(question())
    assert time.monotonic() - began < 0.3


def test_the_first_question_that_fails_stops_the_others(pool):
    def answer(asked: Asked) -> Reply:
        return Reply(status=400, body=b"no") if asked.body["x"] == 3 else Reply(body={"x": 1}, delay=0.05)

    with serving(answer) as (server,):
        with pytest.raises(RefusedError):
            pool(server.url, concurrency=2).ask_all([question(x) for x in range(200)])
        assert len(server.asked) < 20


def test_every_server_is_asked_where_each_one_matters(pool):
    with serving(doubled, lambda asked: Reply(body={"x": 7})) as (one, other):
        answers = pool(one.url, other.url).ask_each(question(4))
    assert {str(address): answer for address, answer in answers.items()} == {one.url: 8, other.url: 7}


def test_a_proxy_of_the_environment_does_not_come_between_loopback(pool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with serving(doubled) as (server,):
        assert pool(server.url).ask(question(1)) == 2


SECRET = "sk-very-secret-0123456789"


def test_a_key_is_sent_and_never_shown(pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setenv("TEACHER_KEY", SECRET)
    key = read_key("TEACHER_KEY", "teacher.api_key_env")
    assert key is not None
    caplog.set_level(logging.DEBUG)
    with serving(lambda asked: Reply(status=401, body=f"Incorrect API key provided: {SECRET}".encode())) as (server,):
        asking = pool(server.url, api_key=key)
        with pytest.raises(ServerError) as raised:
            asking.ask(question())
        assert server.asked[0].headers["authorization"] == f"Bearer {SECRET}"
    said = str(raised.value)
    assert "$TEACHER_KEY" in said and "api_key_env" in said
    everything = [said, repr(key), str(key), repr(asking), caplog.text, repr(raised.value), *map(str, asking.warnings)]
    assert not [text for text in everything if SECRET in text]
    for write in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="not written"):
            write(key)


@pytest.mark.parametrize("name", [SECRET, "hf_AbCdEf", "has space", ""])
def test_a_key_where_its_variable_belongs_is_refused_and_not_shown(name: str):
    with pytest.raises(ConfigError, match="name of an environment variable") as raised:
        read_key(name, "teacher.api_key_env")
    assert not name or name not in str(raised.value)


def test_a_variable_that_is_not_set_or_holds_no_key_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with pytest.raises(ConfigError, match="export TEACHER_KEY"):
        read_key("TEACHER_KEY", "teacher.api_key_env")
    monkeypatch.setenv("TEACHER_KEY", "secret\nInjected: yes")
    with pytest.raises(ConfigError, match="line break") as raised:
        read_key("TEACHER_KEY", "teacher.api_key_env")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [f"http://me:{SECRET}@host:1", f"http://host/?api_key={SECRET}", f"http://{SECRET}@host", f"http://h#{SECRET}"],
)
def test_a_key_in_an_address_is_refused_and_not_shown(url: str):
    with pytest.raises(ConfigError, match=r"teacher\.api_key_env") as raised:
        parse_address(url, "teacher.url")
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("url", ["host:8000", "ftp://host", "http://", "", "http://[::1", "http://h:99999"])
def test_what_is_no_address_is_refused(url: str):
    with pytest.raises(ConfigError, match="http://HOST:PORT"):
        parse_address(url, "teacher.url")


def test_addresses_are_read_as_people_write_them():
    for url in ("http://h:8000", "http://h:8000/", "http://h:8000/v1", " http://h:8000/v1/ "):
        assert str(parse_address(url, "teacher.url")) == "http://h:8000"
    assert str(parse_address("https://h/teachers/a/v1", "teacher.url")) == "https://h/teachers/a"
    assert str(parse_address("http://[::1]:8000", "teacher.url")) == "http://[::1]:8000"
    with pytest.raises(ConfigError, match="more than once"):
        parse_addresses(["http://h:1", "http://h:1/v1"], "teacher.url")
    with pytest.raises(ConfigError, match="empty"):
        parse_addresses([], "teacher.url")


@pytest.mark.parametrize(
    ("url", "warned"),
    [
        ("http://localhost:1", False),
        ("http://127.0.0.7:1", False),
        ("http://[::1]:1", False),
        ("https://teacher.example", False),
        ("http://teacher.example", True),
        ("http://10.0.0.3:8000", True),
        ("http://localhost.example", True),
    ],
)
def test_a_foreign_host_without_encryption_is_a_warning(url: str, warned: bool):
    asking = ServerPool(url, section="teacher")
    assert bool(asking.warnings) is warned
    assert all("https" in said and "unencrypted" in said for said in asking.warnings)


def test_no_try_is_begun_that_is_too_short_to_be_answered(monkeypatch: pytest.MonkeyPatch):
    """Its failure, "no answer within 0.0002 s", would hide why the tries before it failed."""
    now = [100.0]
    monkeypatch.setattr("opd.remote.pool.time.monotonic", lambda: now[0])
    for deadline, shortest in ((600.0, SHORTEST_TRY_S), (0.02, 0.0002)):
        tries = _Tries(question().request, None, deadline)
        assert tries.left == pytest.approx(deadline)
        now[0] += deadline - 1.01 * shortest
        assert tries.left == pytest.approx(1.01 * shortest, rel=1e-3)
        now[0] += 0.02 * shortest
        assert tries.left == 0.0


def test_a_deadline_holds_wherever_it_falls(pool):
    """Between tries, in the middle of one, or as its answer arrives: a cancellation that is swallowed would ask for ever."""
    with serving(lambda asked: Reply(status=429, headers={"retry-after": "0.001"}, delay=0.003)) as (server,):
        for number in range(40):
            began = time.monotonic()
            with pytest.raises(ServerError, match=r"status 429|no answer"):
                pool(server.url, deadline=0.02 + 0.001 * number).ask(question())
            assert time.monotonic() - began < 2.0

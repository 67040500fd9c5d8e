"""A managed server ends whatever happens to opd, and says why it did not start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from opd.errors import ServerError
from opd.samplers.vllm_http import VllmHttp
from opd.samplers.vllm_process import ServerProcess
from opd.testing import digit_tokenizer, save_model, tiny_causal_lm

HERE = Path(__file__).parent
FAMILY = """
import subprocess, sys, time
child = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)", sys.argv[1]]
subprocess.Popen(child)
time.sleep(600)
"""
"""A server with a child that does not go by itself."""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))
    made = tiny_causal_lm(digit_tokenizer(), layers=1, hidden=32, max_positions=64)
    return Path(save_model(made, digit_tokenizer(), tmp_path / "model"))


def fake(*arguments: str, timeout: float = 60.0, python: str | None = None, module: str = "fake_vllm") -> ServerProcess:
    return ServerProcess(python=python, arguments=arguments, timeout=timeout, module=module)


def ready(url: str) -> bool:
    http = VllmHttp(url, key=None, timeout=5.0, connections=1)
    try:
        return http.healthy()
    finally:
        http.close()


def test_it_is_ready_when_start_returns_and_gone_when_stop_does(model: Path, tmp_path: Path):
    said: list[str] = []
    process = fake()
    process.say = said.append
    process.start(model, tmp_path / "log", ready)
    assert process.running and ready(process.url)
    assert (
        "starting a server" in said[0] and str(tmp_path / "log") in said[0] and "ready at http://127.0.0.1:" in said[1]
    )
    process.stop()
    assert not process.running and not ready(process.url)
    process.stop()


def test_a_server_that_fails_shows_the_end_of_its_log(model: Path, tmp_path: Path):
    with pytest.raises(ServerError, match=r"(?s)ended before it was ready.*memory_share.*no memory for the KV cache"):
        fake("--fail").start(model, tmp_path / "log", ready)


def test_an_interpreter_without_vllm_says_so(model: Path, tmp_path: Path):
    with pytest.raises(ServerError, match=r"has no vLLM: install it there, or set rollout.vllm.python"):
        fake(module="vllm_that_is_not_there.entrypoints").start(model, tmp_path / "log", ready)


def test_an_interpreter_that_is_not_there_is_named(model: Path, tmp_path: Path):
    process = fake(python=str(tmp_path / "none" / "python"))
    with pytest.raises(ServerError, match=r"no program '.*none/python'.*rollout\.vllm\.python"):
        process.start(model, tmp_path / "log", ready)
    assert not process.running and process.starts == 0


def test_a_server_that_is_never_ready_is_stopped(model: Path, tmp_path: Path):
    process = fake(timeout=1.0)
    with pytest.raises(ServerError, match=r"was not ready after 1 s \(rollout.vllm.start_timeout\)"):
        process.start(model, tmp_path / "log", lambda _: False)
    assert not process.running


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=["KILL", "TERM", "INT"])
def test_nothing_of_it_outlives_the_process_that_started_it(tmp_path: Path, number: signal.Signals):
    mark = f"mark-{os.getpid()}-{number}"
    guard = HERE.parents[1] / "src" / "opd" / "samplers" / "vllm_guard.py"
    (tmp_path / "family.py").write_text(FAMILY)
    command = [sys.executable, str(guard), sys.executable, str(tmp_path / "family.py"), mark]
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import subprocess, time\nsubprocess.Popen({command!r}, stdin=subprocess.PIPE, start_new_session=True)\ntime.sleep(600)",
        ]
    )
    try:
        until = time.monotonic() + 30
        while len(_marked(mark)) < 3 and time.monotonic() < until:  # the guard, the server, its child
            time.sleep(0.05)
        assert len(_marked(mark)) == 3
        parent.send_signal(number)
        parent.wait(10)
    finally:
        parent.kill()
    until = time.monotonic() + 30
    while _marked(mark) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _marked(mark)


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if words[-1:] == [mark] and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found

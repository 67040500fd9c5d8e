"""`opd serve-teacher` as a process: what it prints, how it ends, and what it says when it cannot begin."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import httpx
import pytest

from opd.cli.main import main
from opd.config.serving import ServeConfig
from opd.errors import ConfigError
from opd.serving.run import read_token
from served import server_process
from worlds import make_world

pytestmark = pytest.mark.timeout(120)

TOKEN = "a-token-of-this-test"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_and_ends_cleanly_at_a_signal(world: Path, number: signal.Signals):
    with server_process(str(world / "teacher"), "--port", "0") as (process, url, lines):
        assert lines[-1] == f"teacher: {{url: '{url}', api: opd}}"
        assert httpx.get(f"{url}/health", trust_env=False).json() == {"status": "ok"}
        assert httpx.get(f"{url}/v1/model", trust_env=False).json()["hidden_size"] == 32
        process.send_signal(number)
        rest, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        assert rest == f"stopping ({number.name}); answers on their way have 10 s\n"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health", trust_env=False)


@pytest.mark.slow
def test_a_token_is_asked_for_and_never_printed(world: Path):
    words = (str(world / "teacher"), "--port", "0", "--token-env", "MY_TOKEN")
    with server_process(*words, MY_TOKEN=TOKEN) as (process, url, lines):
        assert lines[-1] == f"teacher: {{url: '{url}', api: opd, api_key_env: MY_TOKEN}}"
        assert httpx.get(f"{url}/v1/model", trust_env=False).status_code == 401
        headers = {"authorization": f"Bearer {TOKEN}"}
        assert httpx.get(f"{url}/v1/model", headers=headers, trust_env=False).status_code == 200
        process.terminate()
        rest, _ = process.communicate(timeout=30)
    assert TOKEN not in "\n".join(lines) + rest


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["serve-teacher", *words]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    return said


def test_a_taken_port_is_named_before_the_model_is_loaded(world: Path, capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(capsys, "no/such/model", "--port", str(port))
    assert f"Cannot listen at 127.0.0.1:{port}: Address already in use" in said
    assert "--port" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "Name the model to serve: opd serve-teacher MODEL"),
        (("./nowhere", "--port", "0"), "There is no folder './nowhere'"),
        (("./nowhere", "--prot", "1"), "Did you mean 'port'?"),
        (("./nowhere", "--port", "70000"), "port=70000 is none"),
        (("./nowhere", "--port", "0", "--host", "0.0.0.0"), "export OPD_SERVE_TOKEN=$(openssl rand -hex 32)"),
        (("./nowhere", "--port", "0", "--host", "192.0.2.1.5"), "takes a token"),
        (("./nowhere", "--port", "0", "--token-env", "NOT_SET_HERE"), "export NOT_SET_HERE=… first"),
        (("./nowhere", "--port", "0", "--max-tokens", "0"), "max_tokens must be at least 1"),
    ],
)
def test_a_wrong_command_line_is_explained(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]):
    assert said in refused(capsys, *words)


def test_a_host_that_is_not_this_machine_is_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("OPD_SERVE_TOKEN", TOKEN)
    said = refused(capsys, "./nowhere", "--port", "0", "--host", "192.0.2.1")
    assert "192.0.2.1" in said


@pytest.mark.parametrize("token", ["short", "with a space in the middle", "ümlaute-sind-kein-ascii"])
def test_a_token_that_is_none_is_refused_and_not_shown(token: str):
    with pytest.raises(ConfigError, match="at least 16 printable ASCII characters") as error:
        read_token(ServeConfig(model="-"), {"OPD_SERVE_TOKEN": token})
    assert token not in str(error.value)


@pytest.mark.parametrize(("host", "local"), [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("example.org", False)])  # fmt: skip
def test_every_host_that_others_can_reach_needs_a_token(host: str, local: bool):
    config = ServeConfig(model="-", host=host)
    if local:
        assert read_token(config, {}) is None
    else:
        with pytest.raises(ConfigError, match="takes a token"):
            read_token(config, {})
    assert read_token(config, {"OPD_SERVE_TOKEN": TOKEN}) == TOKEN


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]):
    assert main(["serve-teacher", "--help"]) == 0
    said = capsys.readouterr().out
    for option in ("--host", "--port", "--dtype", "--device", "--token-env", "--max-tokens", "--max-queue-tokens"):
        assert option in said

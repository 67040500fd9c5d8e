"""`opd watch`: the server, and the command in a process of its own."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from opd.cli.main import main
from opd.errors import ConfigError
from opd.reporting import RunRecorder, watch, write_report
from opd.reporting.about import write_state
from opd.reporting.watch import LiveReport, server
from reporting.report_inputs import write_run

TIMEOUT_S = 60


@contextmanager
def served(folder: Path) -> Iterator[int]:
    """The port of a server in a thread."""
    with server(folder) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield found.server_address[1]
        finally:
            found.shutdown()
            thread.join(TIMEOUT_S)


def asked(port: int, path: str = "/", method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()


def grow(folder: Path, step: int) -> None:
    with RunRecorder(folder, resume_step=step) as recorder:
        recorder.step(step, {"loss": 0.5})
    write_state(folder, "running", step + 1, 10)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", summary=False)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "EVERY_S", 0.0)
    monkeypatch.setattr(watch, "SHARE", 1e9)


def test_the_page_is_served_with_its_version_and_may_ask_for_that_alone(run):
    with served(run) as port:
        answer, page = asked(port)
        version = asked(port, "/version")[1].decode()
    text = page.decode()
    assert answer.status == 200 and answer.headers["ETag"] == f'"{version}"' and len(version) == 16
    assert f'<meta name="opd-version" content="{version}">' in text
    policy = text.partition('Content-Security-Policy" content="')[2].partition('"')[0]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert (
        answer.headers["X-Content-Type-Options"] == "nosniff"
        and "frame-ancestors" in answer.headers["Content-Security-Policy"]
    )
    on_disk = write_report(run).read_text()
    assert "connect-src 'none'" in on_disk and "opd-version" not in on_disk.partition("<body")[0]


def test_the_version_follows_the_run_and_only_the_run(run, impatient):
    with served(run) as port:
        first = asked(port, "/version")[1]
        assert asked(port, "/version")[1] == first
        grow(run, 4)
        second = asked(port, "/version")[1]
        assert second != first and asked(port)[0].headers["ETag"] == f'"{second.decode()}"'
        write_state(run, "running", 5, 10)  # a later time, and no news
        assert asked(port, "/version")[1] == second


def test_a_page_is_not_written_again_for_every_question(run):
    now = [100.0]
    live = LiveReport(run, clock=lambda: now[0])
    first, _ = live.refresh()
    grow(run, 4)
    now[0] += watch.EVERY_S - 0.1
    assert live.refresh()[0] == first
    now[0] += 0.2
    assert live.refresh()[0] != first


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:1234", 200),
        ("localhost", 200),
        ("[::1]:9", 200),
        ("evil.example", 403),
        ("evil.example:80", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("", 403),
    ],
)
def test_a_name_that_leads_here_from_elsewhere_is_refused(run, host, status):
    with served(run) as port:
        answer, body = asked(port, Host=host)
    assert answer.status == status and (b"<html" in body) == (status == 200)


@pytest.mark.parametrize(
    "path", ["/metrics.jsonl", "/../run/config.yaml", "/%2e%2e/etc/passwd", "//etc/passwd", "/x?y"]
)
def test_nothing_but_the_report_is_served(run, path):
    with served(run) as port:
        assert asked(port, path)[0].status == 404
        assert asked(port, "/", "POST")[0].status == 501
        head, body = asked(port, "/", "HEAD")
    assert head.status == 200 and body == b"" and int(head.headers["Content-Length"]) > 1000


def test_it_listens_on_loopback_alone(run):
    with server(run) as found:
        assert found.server_address[0] == "127.0.0.1"


def test_nothing_is_written_into_the_folder_of_the_run(run, impatient):
    with served(run) as port:
        first = asked(port, "/version")[1]
        grow(run, 4)
        assert asked(port, "/version")[1] != first
    assert not (run / "report.html").exists()


def test_a_run_without_records_yet_is_shown(tmp_path):
    write_state(tmp_path, "loading", 0, 10)
    with served(tmp_path) as port:
        answer, page = asked(port)
    assert answer.status == 200 and b"recorded nothing yet" in page


def test_a_folder_that_goes_away_is_said_in_the_page_and_may_come_back(run, impatient):
    with served(run) as port:
        moved = run.rename(run.with_name("moved"))
        page = asked(port)[1].decode()
        assert "There is no folder" in page and "opd-version" in page and "connect-src 'self'" in page
        moved.rename(run)
        assert "There is no folder" not in asked(port)[1].decode()


def test_wrong_command_lines_are_explained(run, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words, said in (
            ((), "Give one run folder"),
            ((str(run), "more"), "Give one run folder"),
            ((str(run), "--prt", "1"), "Give one run folder"),
            ((str(run), "--port"), "--port takes a number"),
            ((str(run), "--port", "-1"), "--port takes a number"),
            ((str(run), "--port=99999"), "--port takes a number"),
            ((str(run), "--port", str(port)), "Address already in use"),
            ((str(tmp_path / "none"),), "There is no folder"),
            ((str(tmp_path),), "is not a run folder"),
        ):
            assert main(["watch", *words]) == 1
            assert said in capsys.readouterr().err
    with pytest.raises(ConfigError, match="leave --port out"), socket.create_server(("127.0.0.1", 0)) as taken:
        server(run, taken.getsockname()[1])


@pytest.mark.parametrize(
    ("number", "code", "last"), [(signal.SIGINT, 0, "stopped watching"), (signal.SIGTERM, 143, "")]
)
def test_the_command_says_where_it_is_and_ends_with_ctrl_c(run, number, code, last):
    child = subprocess.Popen(
        [sys.executable, "-m", "opd.cli.main", "watch", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        assert line.startswith(f"{run}: http://127.0.0.1:") and "Ctrl-C" in line
        port = int(line.partition("127.0.0.1:")[2].partition("/")[0])
        assert asked(port)[0].status == 200
        child.send_signal(number)
        out, err = child.communicate(timeout=TIMEOUT_S)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == code and last in out and "Traceback" not in err

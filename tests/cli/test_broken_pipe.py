"""A command whose output nobody reads any more ends without a traceback, with SIGPIPE's exit status."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from opd.reporting import RunRecorder

COMMANDS = (
    (),
    ("--help",),
    ("--version",),
    ("train", "--help"),
    ("demo", "--help"),
    ("report", "--help"),
    ("verl", "--help"),
    ("verl", "patch", "--help"),
    ("doctor", "--help"),
)


def opd_into_a_pipe_without_a_reader(*words: str) -> subprocess.CompletedProcess[str]:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-m", "opd.cli.main", *words]
        return subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    finally:
        os.close(writer)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_pipe_without_a_reader_ends_a_command_quietly(words):
    done = opd_into_a_pipe_without_a_reader(*words)
    assert done.returncode in (141, 1)
    assert done.stderr == ""


def test_a_report_is_written_although_nobody_reads_where(tmp_path):
    with RunRecorder(tmp_path, resume_step=None) as recorder:
        recorder.step(0, {"loss": 1.0})
    done = opd_into_a_pipe_without_a_reader("report", str(tmp_path))
    assert (done.returncode, done.stderr) == (141, "")
    assert (tmp_path / "report.html").exists()


def test_a_reader_that_stops_early_ends_help_quietly():
    command = [sys.executable, "-m", "opd.cli.main", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=120) in (141, 1, 0)  # 0 when all was written before the reader left

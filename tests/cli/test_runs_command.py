"""`opd runs`: every run below a folder is one line, whatever state it is in, and nothing heavy is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from desks import MAX_CPU_S, answered, check_refusal
from opd.cli.main import main
from opd.reporting.about import About, write_about, write_state
from opd.reporting.listing import TAIL_BYTES, read_listed
from opd.reporting.record import RunRecorder


def make_run(folder: Path, *, state: str = "running", step: int = 3, why: str = "", **changed: object) -> Path:
    """A run of 10 steps with an evaluation before the first."""
    with RunRecorder(folder, resume_step=None) as run:
        run.evaluation(0, "student", {"accuracy": 0.25, "reverse_kl": 1.5})
        run.evaluation(0, "teacher", {"accuracy": 0.75, "reverse_kl": 0.0})
        for number in range(step):
            run.step(number, {"loss": 1.0})
    (folder / "config.yaml").write_text(
        "student: {model: org/small}\nteacher: {model: /models/big}\nobjective: {divergence: forward_kl}\ntrain: {steps: 10}\n"
    )
    if state:
        write_about(folder, About(student="org/small", teacher="/models/big", objective="reverse KL, whole vocabulary"))
        write_state(folder, state, step, 10, why)  # pyright: ignore[reportArgumentType]
        if changed:
            values = json.loads((folder / "state.json").read_text())
            (folder / "state.json").write_text(json.dumps({**values, **changed}))
    return folder


def listed(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["runs", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def dead_process() -> int:
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait(timeout=60)
    return child.pid


def test_every_state_is_told_from_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_run(tmp_path / "going")
    make_run(tmp_path / "done", state="finished", step=10)
    make_run(tmp_path / "ended", state="stopped", why="SIGTERM")
    make_run(tmp_path / "broken", state="failed", why="no space")
    make_run(tmp_path / "killed", pid=dead_process())
    make_run(tmp_path / "elsewhere", host="another", updated=time.time() - 3 * 3600)
    make_run(tmp_path / "old", state="")
    found = {
        Path(row["folder"]).name: (row["state"], row["why"], row["step"], row["steps"])
        for row in listed(capsys, tmp_path)
    }
    assert found == {
        "going": ("running", "", 3, 10),
        "done": ("finished", "", 10, 10),
        "ended": ("stopped", "SIGTERM", 3, 10),
        "broken": ("failed", "no space", 3, 10),
        "killed": ("crashed", "its process is gone", 3, 10),
        "elsewhere": ("running", "no word for 3 h 0 min", 3, 10),
        "old": ("unfinished", "", 3, 10),
    }


def test_runs_are_found_at_any_depth_and_are_in_order_of_their_news(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    now = time.time()
    make_run(tmp_path / "a" / "b" / "deep", updated=now - 10)
    make_run(tmp_path / "first", updated=now)
    make_run(tmp_path / "first" / "student" / "inside")
    make_run(tmp_path / ".hidden" / "run")
    make_run(tmp_path / "last", updated=now - 20)
    (tmp_path / "evaluated").mkdir()
    for name in ("config.yaml", "metrics.jsonl", "eval.json"):
        (tmp_path / "evaluated" / name).write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert [Path(row["folder"]).name for row in listed(capsys, tmp_path)] == ["first", "deep", "last"]
    assert [row["folder"] for row in listed(capsys, tmp_path / "last")] == [str(tmp_path / "last")]


def test_the_last_evaluation_of_the_student_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path / "run")
    with RunRecorder(run, resume_step=10) as records:
        records.evaluation(3, "student", {"accuracy": 0.5, "reverse_kl": 0.125})
        records.evaluation(3, "teacher", {"accuracy": 0.9})
    with open(run / "metrics.jsonl", "a") as stream:
        stream.write('{"schema_version":1,"kind":"eval","step":4,"who":"stu')  # a run that is writing
    (row,) = listed(capsys, tmp_path)
    assert (row["evaluated_at"], row["evaluation"]) == (3, {"accuracy": 0.5, "reverse_kl": 0.125})
    assert main(["runs", str(tmp_path)]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "run" and "student ← teacher" in head
    for word in ("run", "org/small ← big", "reverse KL, whole vocabulary", "running", "3 of 10", "50.0%, KL 0.125"):
        assert word in line


def test_an_evaluation_far_from_the_end_of_a_long_file_is_found(tmp_path: Path):
    run = make_run(tmp_path / "run", step=0)
    with RunRecorder(run, resume_step=0) as records:
        for number in range(3000):
            records.step(number, {"loss": 1.0})
    assert (run / "metrics.jsonl").stat().st_size > TAIL_BYTES
    assert read_listed(run).evaluation == {"accuracy": 0.25, "reverse_kl": 1.5}
    os.remove(run / "state.json")
    assert read_listed(run).step == 3000


def test_without_a_folder_runs_is_looked_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    make_run(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    assert [row["folder"] for row in listed(capsys)] == ["other"]
    make_run(tmp_path / "runs" / "one")
    assert [row["folder"] for row in listed(capsys)] == ["runs/one"]


def test_damaged_files_cost_no_other_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_run(tmp_path / "good")
    bad = make_run(tmp_path / "bad")
    (bad / "state.json").write_text("{")
    (bad / "about.json").write_bytes(b"\xff")
    (bad / "metrics.jsonl").write_bytes(b"\xff\n[]\n")
    (bad / "config.yaml").write_text("student: [")
    assert {Path(row["folder"]).name for row in listed(capsys, tmp_path)} == {"good", "bad"}
    assert main(["runs", str(tmp_path)]) == 0


def test_nothing_is_found_without_an_error_and_without_torch(tmp_path: Path):
    answer = answered(tmp_path, "runs")
    assert (answer.last, answer.out) == ("code 0 heavy", "")
    assert answer.err == "There are no runs in '.' or below.\n"
    make_run(tmp_path / "runs" / "one")
    answer = answered(tmp_path, "runs")
    assert answer.last == "code 0 heavy" and answer.out.splitlines()[1].startswith("one ")
    assert answer.cpu_s < MAX_CPU_S


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "There is no folder 'nowhere'."),
        (["a", "b"], "Give one folder, not 2"),
        (["--jsn"], "There is no option --jsn here. Did you mean --json?"),
    ],
)
def test_a_wrong_word_is_refused(tmp_path: Path, words: list[str], said: str):
    check_refusal(tmp_path, ["runs", *words], said)

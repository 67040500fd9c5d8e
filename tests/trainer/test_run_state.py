"""about.json, state.json and the report while a run goes on, and after it ended in any way."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opd.cli.main import main
from opd.config.recipe import build, merge
from opd.errors import DataError
from opd.reporting.about import read_about, read_state
from opd.reporting.record import read_metrics, read_samples
from opd.trainer import run_state
from opd.trainer.distiller import Distiller
from opd.trainer.interrupts import RunStopped, Stop
from opd.trainer.launch import Launch, commit_of
from opd.trainer.run import train
from opd.trainer.run_state import Pace, RunState, why_of
from worlds import settings

TIMEOUT_S = 120
QUICK = {"train__steps": 3, "eval__every": 0}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(values: dict[str, object], *, overwrite: bool = False) -> None:
    train(build(merge({}, values)), overwrite=overwrite)


def without_times(run_dir: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in record.metrics.items() if not name.startswith("time/")}
        for record in read_metrics(run_dir)
    ]


def test_a_finished_run_says_what_it_was(world, tmp_path):
    run(settings(world, tmp_path / "run", **QUICK))
    about, state = read_about(tmp_path / "run"), read_state(tmp_path / "run")
    assert about is not None and state is not None
    assert (about.student, about.teacher) == (f"{world}/student", f"{world}/teacher")
    assert about.objective == "reverse KL, whole vocabulary" and about.device.startswith("cpu")
    assert about.data == f"{world}/prompts.jsonl" and about.started[:2] == "20" and "+" in about.started
    assert {"python", "opd", "torch", "transformers"} <= about.versions.keys()
    assert (state.name, state.step, state.steps, state.why) == ("finished", 3, 3, "")
    assert state.pid == os.getpid() and abs(time.time() - state.updated) < 60


def test_the_state_is_loading_then_running_step_by_step(world, tmp_path, monkeypatch):
    monkeypatch.setattr(run_state, "STATE_EVERY_S", 0.0)
    monkeypatch.setattr(run_state, "SHARE", 1e9)
    folder, seen = tmp_path / "run", []

    def note(record: dict[str, float]) -> None:
        seen.append(read_state(folder))

    distiller = Distiller.from_config(build(merge({}, settings(world, folder, **QUICK))), callbacks=note)
    build_parts = distiller._build

    def build_and_note(*words: object) -> object:
        seen.append(read_state(folder))
        return build_parts(*words)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(distiller, "_build", build_and_note)
    distiller.train()
    went_on = [("running", 1), ("running", 2), ("running", 3)]
    assert [(state.name, state.step) for state in seen] == [("loading", 0), *went_on]
    seen.clear()
    again = Distiller.from_config(distiller.config, callbacks=note)
    build_parts = again._build
    monkeypatch.setattr(again, "_build", build_and_note)
    again.train(overwrite=True)  # the old run is whole until the new one can start
    assert [(state.name, state.step) for state in seen] == [("finished", 3), *went_on]


def test_a_run_that_cannot_start_leaves_no_state_and_claims_no_folder(world, tmp_path):
    folder = tmp_path / "run"
    values = settings(world, folder, **QUICK)
    broken = values | {"prompts.path": str(tmp_path / "none.jsonl")}
    with pytest.raises(DataError):
        run(broken)
    assert {path.name for path in folder.iterdir()} == {".lock"}
    run(values)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(DataError):
        run(broken, overwrite=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_state_left_by_a_kill_while_loading_is_no_run(world, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    run_state.write_state(folder, "loading", 0, 3)
    run(settings(world, folder, **QUICK))
    state = read_state(folder)
    assert state is not None and state.name == "finished"


def test_a_resumed_run_keeps_its_beginning_and_renews_the_rest(world, tmp_path):
    folder = tmp_path / "run"
    values = settings(world, folder, **QUICK) | {"checkpoint.every": 1}
    run(values)
    first = read_about(folder)
    launch = Launch(command="opd train again.yaml --resume", folder=tmp_path)
    train(build(merge({}, values | {"train.steps": 4, "optimizer.warmup_steps": 2})), resume=True, launch=launch)
    second, state = read_about(folder), read_state(folder)
    assert first is not None and second is not None and state is not None
    assert second.started == first.started and second.command == "opd train again.yaml --resume"
    assert (state.name, state.step, state.steps) == ("finished", 4, 4)


def test_a_callback_and_a_signal_stop_a_run_with_their_reason(world, tmp_path):
    def enough(record: dict[str, float]) -> None:
        if record["step"] == 1:
            raise Stop("it is good enough")

    def told(record: dict[str, float]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    for name, callback, error, why in (
        ("callback", enough, None, "stopped by the callback enough after step 1: it is good enough"),
        ("signal", told, RunStopped, "SIGTERM"),
    ):
        folder = tmp_path / name
        distiller = Distiller.from_config(build(merge({}, settings(world, folder, **QUICK))), callbacks=callback)
        if error is None:
            distiller.train()
        else:
            with pytest.raises(error):
                distiller.train()
        state = read_state(folder)
        assert state is not None and (state.name, state.why) == ("stopped", why)
        assert (folder / "report.html").exists()


def test_an_exception_leaves_its_first_sentence_and_a_report(world, tmp_path):
    def breaks(record: dict[str, float]) -> None:
        raise ZeroDivisionError("nothing \x1b[2J is left. A second sentence")

    folder = tmp_path / "run"
    with pytest.raises(DataError):
        Distiller.from_config(build(merge({}, settings(world, folder, **QUICK))), callbacks=breaks).train()
    state = read_state(folder)
    assert state is not None and (state.name, state.step) == ("failed", 1)
    assert state.why == "The callback breaks failed after step 0: ZeroDivisionError: nothing \\x1b[2J is left"
    assert (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (DataError("One thing is wrong. Mend it."), "One thing is wrong"),
        (ValueError("bad\n value 0.5 here. More"), "ValueError: bad value 0.5 here"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("x" * 5000), "RuntimeError: " + "x" * 286),
    ],
)
def test_why_is_one_sentence(error, why):
    assert why_of(error) == why


def test_neither_state_nor_report_takes_more_than_its_share():
    clock = Clock()
    pace, done = Pace(60.0, 0.1, clock), []

    def work() -> None:
        done.append(clock.now)
        clock.now += 3.0

    while clock.now < 3600.0:
        if pace.due():
            pace.do(work)
        clock.now += 1.0
    assert done[0] == 60.0 and 0.019 < len(done) * 3.0 / clock.now <= 0.021


def test_the_report_comes_early_once_then_every_minute_and_at_evaluations(tmp_path, monkeypatch):
    clock, reports, states = Clock(), [], []
    monkeypatch.setattr(run_state, "write_report", lambda _: reports.append(clock.now))
    monkeypatch.setattr(run_state, "write_state", lambda *_: states.append(clock.now))
    state = RunState(tmp_path, 1000, print, clock=clock)
    for step in range(1, 2001):
        clock.now = step / 10
        state.running(step, evaluated=step in (10, 900))
    assert reports == [5.0, 65.0, 90.0, 150.0]  # the evaluation after a second is no news that somebody waits for
    assert max(b - a for a, b in itertools.pairwise(states)) < 1.2 and len(states) < 210


def test_reports_during_the_run_do_not_move_a_bit(world, tmp_path, monkeypatch):
    run(settings(world, tmp_path / "plain", **QUICK))
    monkeypatch.setattr(run_state, "SHARE", 1e9)
    monkeypatch.setattr(run_state, "REPORT_EVERY_S", 0.0)
    reports = []
    original = run_state.write_report
    monkeypatch.setattr(run_state, "write_report", lambda folder: (reports.append(folder), original(folder)))
    run(settings(world, tmp_path / "watched", **QUICK, log__progress="plain", log__show_samples=1))
    assert len(reports) >= 4  # at the start, after every step, and at the end
    assert without_times(tmp_path / "plain") == without_times(tmp_path / "watched")
    for name in ("model.safetensors",):
        assert (tmp_path / "plain/student" / name).read_bytes() == (tmp_path / "watched/student" / name).read_bytes()


def test_a_sampled_answer_is_shown_with_the_kl_that_is_recorded_of_it(world, tmp_path, capsys):
    folder = tmp_path / "shown"
    run(settings(world, folder, **QUICK, log__progress="plain", log__show_samples=1, log__samples_every=1))
    first = next(s for s in read_samples(folder) if s.phase == "train")
    assert first.reverse_kl is not None
    mean = sum(first.reverse_kl) / len(first.reverse_kl)
    heading = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1: one of "))
    assert f"mean KL {mean:.3g} nats" in heading and f"{len(first.tokens)} token" in heading


def test_a_report_that_fails_during_the_run_is_said_once_and_ends_nothing(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_state, "SHARE", 1e9)
    monkeypatch.setattr(run_state, "REPORT_EVERY_S", 0.0)

    def refuse(_: Path) -> None:
        raise KeyError("no such panel")

    with monkeypatch.context() as broken:
        broken.setattr(run_state, "write_report", refuse)
        words = settings(world, tmp_path / "a run", **QUICK, log__progress="plain")
        assert main(["train", *(word for key, value in words.items() for word in (f"--{key}", str(value)))]) == 0
    out = capsys.readouterr().out
    assert out.count("The report could not be written: KeyError: 'no such panel'") == 1
    assert f"student: {tmp_path}/a run/student" in out and "\nreport:" not in out
    (warning,) = [line for line in out.splitlines() if "could not be written" in line]
    assert main(shlex.split(warning.partition("write it later with: ")[2])[1:]) == 0
    assert (tmp_path / "a run" / "report.html").exists()


def test_a_state_that_cannot_be_written_is_said_once_and_ends_nothing(world, tmp_path, capsys):
    folder = tmp_path / "run"
    (folder / "state.json").mkdir(parents=True)  # nothing can replace a folder by a file
    run(settings(world, folder, **QUICK, log__progress="plain"))
    out = capsys.readouterr().out
    assert out.count("its report cannot say how far it is") == 1
    assert (folder / "student" / "model.safetensors").exists()


@pytest.mark.slow
def test_kill_9_leaves_a_fresh_report_and_a_state_that_reads_as_dead(world, tmp_path):
    folder = tmp_path / "run"
    values = settings(
        world, folder, train__steps=1_000_000, eval__every=0, checkpoint__every=0, log__samples_every=10**9
    )
    words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    child = subprocess.Popen([sys.executable, "-m", "opd.cli.main", "train", *words], stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + TIMEOUT_S
        while not (folder / "report.html").exists():
            assert time.monotonic() < until and child.poll() is None
            time.sleep(0.2)
        state = read_state(folder)
        assert state is not None and state.alive and state.name == "running"
    finally:
        child.kill()
        child.wait()
    state = read_state(folder)
    assert state is not None and (state.name, state.alive, state.pid) == ("running", False, child.pid)
    assert time.time() - state.updated < 60 and time.time() - (folder / "report.html").stat().st_mtime < 60
    steps = len([record for record in read_metrics(folder) if record.kind == "step"])
    assert 0 < state.step <= steps


def git(folder: Path, *words: str) -> str:
    names = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    command = ["git", "-C", str(folder), *words]
    environment = {**os.environ, **names, "GIT_CONFIG_GLOBAL": os.devnull}
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=60, env=environment
    ).stdout.strip()


def test_the_commit_is_of_the_folder_of_the_recipe_and_marks_its_changes(tmp_path, monkeypatch):
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    assert commit_of(recipes) == ""
    git(tmp_path, "init", "-q")
    assert commit_of(recipes) == ""
    for place in (recipes / "r.yaml", tmp_path / "other"):
        place.write_text("one")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")[:12]
    assert commit_of(recipes) == commit
    (tmp_path / "other").write_text("two")
    assert commit_of(recipes) == commit
    (recipes / "r.yaml").write_text("two")
    assert commit_of(recipes) == f"{commit}+"
    monkeypatch.setenv("PATH", "")
    assert commit_of(recipes) == ""


def test_a_command_line_is_written_as_a_shell_reads_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/venv/bin/opd", "train", "a b.yaml", "--resume"])
    assert Launch().command == "opd train 'a b.yaml' --resume"


def test_state_json_is_json(tmp_path):
    run_state.write_state(tmp_path, "running", 1, 2, "a\ud800b")
    assert json.loads((tmp_path / "state.json").read_text())["why"].startswith("a")

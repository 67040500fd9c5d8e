"""SIGTERM, SIGHUP and Ctrl-C end a run after the step, saved; what they say is what --resume does."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from test_resume import assert_same_run

from opd.cli.main import main
from opd.config.recipe import build, merge
from opd.reporting.record import read_metrics
from opd.trainer import draws, evaluate
from opd.trainer.interrupts import RunStopped
from opd.trainer.run import train
from worlds import settings

LONG = {"train__steps": 6, "eval__every": 3, "checkpoint__every": 4}


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A signal that arrives at the n-th call of a function of the loop, which is real but for that."""

    def at(name: str, call: int, *numbers: int, module: ModuleType = draws) -> None:
        original, seen = getattr(module, name), []

        def wrapped(*args: object, **options: object) -> object:
            seen.append(name)
            for number in numbers if len(seen) == call else ():
                os.kill(os.getpid(), number)
            return original(*args, **options)

        monkeypatch.setattr(module, name, wrapped)

    return at


def run(values: dict[str, object], **options: bool) -> dict | None:
    return train(build(merge({}, values)), **options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_a_step_finishes_and_saves_it_and_resume_ends_bit_for_bit(
    world, tmp_path, monkeypatch, interrupted, number
):
    run(settings(world, tmp_path / "whole", **LONG))
    values = settings(world, tmp_path / "run", **LONG)
    interrupted("derive_seed", 3, number)
    with pytest.raises(RunStopped) as stopped:
        run(values)
    monkeypatch.undo()
    name = signal.Signals(number).name
    assert stopped.value.facts.startswith(
        f"{name}: stopped after 3 of 6 steps, saved in {tmp_path}/run/checkpoints/step-00000003"
    )
    assert stopped.value.next == "resume" and (tmp_path / "run" / "report.html").exists()
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    run(values, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_signal_in_an_evaluation_does_not_wait_for_its_end_and_resume_makes_it_again(
    world, tmp_path, monkeypatch, interrupted
):
    run(settings(world, tmp_path / "whole", **LONG))
    values = settings(world, tmp_path / "run", **LONG)
    interrupted("derive_seed", 3, signal.SIGTERM, module=evaluate)  # student and teacher at step 0, then after step 3
    with pytest.raises(RunStopped, match=r"stopped after 3 of 6 steps"):
        run(values)
    assert not [r for r in read_metrics(tmp_path / "run") if r.kind == "eval" and r.step == 3]
    monkeypatch.undo()
    run(values, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_signal_before_the_first_step_says_that_there_is_nothing_to_resume(world, tmp_path, interrupted):
    values = settings(world, tmp_path / "run", **LONG)
    interrupted("derive_seed", 1, signal.SIGTERM, module=evaluate)
    with pytest.raises(RunStopped, match=r"before a step was saved, so there is nothing to resume") as stopped:
        run(values)
    assert stopped.value.next == "overwrite" and not (tmp_path / "run" / "checkpoints").exists()


def test_a_second_signal_ends_the_run_at_once(world, tmp_path, interrupted):
    values = settings(world, tmp_path / "run", **LONG)
    interrupted("derive_seed", 6, signal.SIGTERM, signal.SIGTERM)
    with pytest.raises(RunStopped, match=r"stopped at once; the last checkpoint has 4 of 6 steps"):
        run(values)
    assert len([r for r in read_metrics(tmp_path / "run") if r.kind == "step"]) == 5


def test_a_signal_after_the_last_step_does_not_take_the_student_away(world, tmp_path, monkeypatch):
    from opd.trainer import lifecycle as module

    original = module.save_student

    def save_and_be_told_to_stop(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        original(*args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(module, "save_student", save_and_be_told_to_stop)
    assert run(settings(world, tmp_path / "run", **LONG)) is not None
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()


def test_a_handler_of_the_caller_and_an_ignored_signal_are_left_alone(world, tmp_path, interrupted):
    came: list[int] = []
    before = (
        signal.signal(signal.SIGTERM, lambda number, _: came.append(number)),
        signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    try:
        interrupted("derive_seed", 2, signal.SIGTERM, signal.SIGHUP)
        run(settings(world, tmp_path / "run", **(LONG | {"train__steps": 2, "eval__every": 0})))
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGHUP), before, strict=True):
            signal.signal(number, handler)
    assert came == [signal.SIGTERM]


def test_a_run_in_another_thread_trains_without_handlers(world, tmp_path):
    values = settings(world, tmp_path / "run", **(LONG | {"train__steps": 1, "reward__timeout": 0}))
    thread = threading.Thread(target=run, args=(values,))
    thread.start()
    thread.join(timeout=60)
    assert (tmp_path / "run" / "student").exists()


def test_the_command_that_a_stopped_run_prints_goes_on_to_the_end(world, tmp_path, capsys, interrupted):
    recipe = tmp_path / "my recipe.yaml"
    recipe.write_text(yaml.safe_dump(merge({}, settings(world, tmp_path / "run", **LONG))))
    interrupted("derive_seed", 2, signal.SIGHUP)
    assert main(["train", str(recipe), "--seed", "1"]) == 128 + signal.SIGHUP
    said = capsys.readouterr().err.strip().splitlines()[-1]
    command = said.partition("Continue with: ")[2]
    assert command == f"opd train '{recipe}' --seed 1 --resume"
    assert main(shlex.split(command)[1:]) == 0


def test_the_command_after_a_run_that_saved_nothing_starts_it_again(world, tmp_path, capsys, interrupted):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(merge({}, settings(world, tmp_path / "run", **LONG))))
    interrupted("derive_seed", 1, signal.SIGINT, module=evaluate)
    assert main(["train", str(recipe), "--resume"]) == 128 + signal.SIGINT
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--resume" not in said and said.endswith(f"Start again with: opd train {recipe} --overwrite")
    assert main(shlex.split(said.partition("with: ")[2])[1:]) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_outside_a_run_promises_nothing(capsys, monkeypatch, tmp_path, number):
    from opd.cli import report

    monkeypatch.setattr(report, "run", lambda _: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    assert main(["report", str(tmp_path)]) == 128 + number
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(number) == before


def test_a_signal_while_models_load_leaves_the_old_run_as_it_was(world, tmp_path, capsys, monkeypatch):
    from opd.trainer import distiller as module

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(merge({}, settings(world, tmp_path / "run", **LONG))))
    run(settings(world, tmp_path / "run", **LONG))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    def killed(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(module, "RunComponents", killed)
    assert main(["train", str(recipe), "--overwrite"]) == 128 + signal.SIGTERM
    said = capsys.readouterr().err
    assert "stopped before the first step, and nothing was changed" in said and said.rstrip().endswith("--overwrite")
    assert main(["train", str(recipe), "--resume"]) == 128 + signal.SIGTERM
    assert "the last checkpoint has 4 of 6 steps" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_real_process_leaves_a_checkpoint_and_its_exit_code(world, tmp_path, number):
    values = settings(world, tmp_path / "run", train__steps=100_000, checkpoint__every=0, eval__every=0)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(merge({}, values)))
    command = [sys.executable, "-m", "opd.cli.main", "train", str(recipe)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(tmp_path / "run" / "metrics.jsonl", process)
            process.send_signal(number)
            said = process.communicate(timeout=120)[1]
        finally:
            process.kill()  # a run that ignored the signal would go on for hours
    assert process.returncode == 128 + number, said
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    steps = int(saved.name.removeprefix("step-"))
    assert f"stopped after {steps} of 100000 steps" in said and f"opd train {recipe} --resume" in said
    assert len(read_metrics(tmp_path / "run")) == steps


def wait_for(file: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not (file.exists() and file.stat().st_size):
        assert time.monotonic() < end and process.poll() is None, "the run did not start"
        time.sleep(0.1)


def test_a_run_whose_output_nobody_reads_any_more_is_saved_and_resume_ends_bit_for_bit(world, tmp_path):
    more = {
        "train__steps": 30,
        "eval__every": 0,
        "checkpoint__every": 0,
        "log__progress": "plain",
        "log__show_samples": 1,
    }
    run(settings(world, tmp_path / "whole", **more))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(merge({}, settings(world, tmp_path / "run", **more))))
    process = subprocess.Popen(
        [sys.executable, "-m", "opd", "train", str(recipe)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if line.startswith("step 1:"):  # a sampled answer of step 1; later ones meet a pipe without a reader
            break
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 128 + signal.SIGPIPE, said
    steps = [r for r in read_metrics(tmp_path / "run") if r.kind == "step"]
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert 0 < len(steps) < 30 and saved.name == f"step-{len(steps):08d}"
    run(merge({}, settings(world, tmp_path / "run", **more)), resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")

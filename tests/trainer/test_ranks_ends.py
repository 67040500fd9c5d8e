"""However one of several ranks ends, all end within a minute, one message says why, and --resume goes on with any number of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from opd.cli.main import main
from opd.config.recipe import build, merge
from opd.ranks import STARTED_BY
from opd.reporting.record import read_metrics
from opd.trainer.run import train
from worlds import settings

TESTS = Path(__file__).parent.parent
PROGRAM = Path(__file__).with_name("rank_ends.py")
MINUTE = 60
WEIGHT = 1e-5
"""Between runs of one process and of several, as in test_ranks.py."""
LONG = {"train__steps": 300, "eval__every": 0, "checkpoint__every": 0}
SHORT = {"train__steps": 6, "eval__every": 3, "checkpoint__every": 3}


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]), **more}


def ended(how: str, world: int, folder: Path) -> list[tuple[int, str]]:
    """Exit codes and words of all ranks of the program."""
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), STARTED_BY: str(folder / "store")}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), how],
            env=environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [rank.communicate(timeout=MINUTE)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, words) for rank, words in zip(ranks, said, strict=True)]


@pytest.mark.parametrize("world", [2, 3])
def test_a_killed_rank_ends_the_others_which_name_it(tmp_path, world):
    *others, last = ended("killed", world, tmp_path)
    assert last[0] == -signal.SIGKILL
    assert [code for code, _ in others] == [1] * (world - 1)
    assert others[0][1].startswith(f"error: rank {world - 1} ended without a word")
    assert "Traceback" not in "".join(words for _, words in others)


def test_a_mistake_on_one_rank_shows_its_traceback_there_and_a_line_on_rank_0(tmp_path):
    first, second, last = ended("a mistake", 3, tmp_path)
    assert "Traceback" in last[1] and "a mistake of ours" in last[1] and last[1].startswith("rank 2:")
    assert first[0] == 1 and first[1].startswith("error: rank 2 ended by RuntimeError: a mistake of ours.")
    assert second == (0, "") and last[0] == 0


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("bad data", "error: rank 1: prompt 3 is empty."),
        ("bad data everywhere", "error: prompt 3 is empty."),
        ("bad data on rank 0", "error: prompt 3 is empty."),
        ("another recipe", "error: Ranks were started with other recipes: rank 0 and rank 1 differ in optimizer.lr."),
    ],
)
def test_an_error_of_the_users_is_printed_once_by_rank_0(tmp_path, how, said):
    first, second = ended(how, 2, tmp_path)
    assert first[0] == 1 and first[1].startswith(said) and first[1].count("\n") == 1
    assert second == (0, "")


@pytest.mark.parametrize("how", ["in order", "late"])
def test_ranks_that_wait_for_rank_0_end_with_it(tmp_path, how):
    assert ended(how, 2, tmp_path) == [(0, ""), (0, "")]


# Whole runs


def recipe(world: Path, folder: Path, **more: object) -> Path:
    path = folder / "recipe.yaml"
    values = settings(world, folder / "run", **more)
    path.write_text(yaml.safe_dump(merge({}, values)))
    return path


def command(path: Path, *words: str, torchrun: bool = False, devices: int = 2) -> list[str]:
    if torchrun:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
        return [*start, "-m", "opd", "train", str(path), *words]
    return [sys.executable, "-m", "opd", "train", str(path), "--devices", str(devices), *words]


def finished(words: Sequence[str]) -> str:
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wait_for_steps(run_dir: Path, count: int) -> None:
    until = time.monotonic() + 2 * MINUTE
    while time.monotonic() < until:
        if (run_dir / "metrics.jsonl").exists() and len(read_metrics(run_dir)) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"{run_dir} has no {count} steps")


def pid_of(rank: int, run_dir: Path) -> int:
    """The process of this rank of the run, by its command and its environment."""
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                words, own = (place / "cmdline").read_bytes(), (place / "environ").read_bytes()
            except OSError:
                continue
            if str(run_dir.parent).encode() in words and f"\0RANK={rank}\0".encode() in b"\0" + own:
                return int(place.name)
    raise AssertionError(f"rank {rank} is not there")


def assert_within_rounding(run_dir: Path, reference: Path) -> None:
    own, theirs = (load_file(folder / "student" / "model.safetensors") for folder in (run_dir, reference))
    assert own.keys() == theirs.keys()
    for name, weight in own.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=WEIGHT)
    samples = [
        [(row["step"], row["prompt"], row["response"]) for row in map(json.loads, (folder / "samples.jsonl").open())]
        for folder in (run_dir, reference)
    ]
    assert samples[0] == samples[1]
    rows = [[(r.kind, r.step, r.metrics) for r in read_metrics(folder)] for folder in (run_dir, reference)]
    for (kind, step, ours), (other_kind, other_step, reference_metrics) in zip(*rows, strict=True):
        assert (kind, step, ours.keys()) == (other_kind, other_step, reference_metrics.keys())
        assert ours.get("loss", 0.0) == pytest.approx(reference_metrics.get("loss", 0.0), rel=1e-4)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    """The run of one process, without a stop."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(build(merge({}, settings(world, folder, **SHORT))))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("torchrun", [False, True], ids=["devices", "torchrun"])
def test_a_rank_killed_in_a_run_takes_it_down_and_what_was_trained_is_saved(world, tmp_path, torchrun):
    path = recipe(world, tmp_path, **LONG)
    process = subprocess.Popen(
        command(path, torchrun=torchrun),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for_steps(tmp_path / "run", 3)
        os.kill(pid_of(1, tmp_path / "run"), signal.SIGKILL)
        said, _ = process.communicate(timeout=MINUTE)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "rank 1 ended without a word" in said
    assert torchrun or "error: rank 1 was ended by SIGKILL" in said
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    saved = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert state["name"] == "failed" and int(saved[-1].name.removeprefix("step-")) == state["step"] >= 2


@pytest.mark.slow
def test_a_signal_stops_all_ranks_after_the_step_and_the_printed_command_goes_on(world, tmp_path):
    path = recipe(world, tmp_path, **LONG)
    process = subprocess.Popen(
        command(path), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for_steps(tmp_path / "run", 3)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=MINUTE)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, said
    found = re.search(r"Continue with: opd (train \S+ --devices 2 --resume)", said)
    assert found is not None and "Traceback" not in said
    reached = len(read_metrics(tmp_path / "run"))
    more = ["--train.steps", str(reached + 2)]
    finished([sys.executable, "-m", "opd", *found[1].split(), *more])
    assert len(read_metrics(tmp_path / "run")) == reached + 2


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks_as_if_it_had_not_stopped(world, tmp_path, whole, first, then):
    path = recipe(world, tmp_path, **SHORT)
    finished(command(path, "--train.steps", "3", devices=first))
    finished(command(path, "--resume", devices=then))
    assert_within_rounding(tmp_path / "run", whole)


# Bad input


@pytest.mark.parametrize(
    ("more", "words", "said"),
    [
        ({}, ["13"], r"13 ranks are more than the 12 samples of a step .* Start 12 or fewer"),
        ({"rollout__engine": "vllm"}, ["2"], r"rollout\.engine=vllm serves one training process"),
        ({"teacher__device": "cuda:1"}, ["2"], r"teacher\.device=cuda:1 names one device.*Set teacher\.device=auto"),
        ({"teacher__cache": "scores"}, ["2"], r"teacher\.cache counts what it keeps in one process"),
        ({"train__parallel": "fsdp2", "optimizer__name": "muon"}, ["2"], r"muon orthogonalises whole matrices"),
        ({}, ["0"], r"--devices takes the number of processes"),
        ({}, ["many"], r"--devices takes the number of processes.*'many'"),
        ({}, [], r"--devices takes the number of processes.*''"),
    ],
)
def test_what_several_ranks_cannot_do_is_refused_before_one_is_started(world, tmp_path, capsys, more, words, said):
    path = recipe(world, tmp_path, **more)
    assert main(["train", str(path), "--devices", *words]) == 1
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_devices_beside_torchrun_are_refused(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", str(recipe(world, tmp_path)), "--devices=2"]) == 1
    assert "torchrun has started 2 processes, and --devices would start more" in capsys.readouterr().err


def test_several_machines_are_refused(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert main(["train", str(recipe(world, tmp_path))]) == 1
    assert "on several machines" in capsys.readouterr().err


def test_one_device_is_a_run_without_other_processes(world, tmp_path):
    path = recipe(world, tmp_path, **{**SHORT, "train__steps": 1, "eval__every": 0})
    assert main(["train", str(path), "--devices", "1"]) == 0
    assert len(read_metrics(tmp_path / "run")) == 1

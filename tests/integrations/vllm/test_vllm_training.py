"""`opd train` with a managed vLLM server: from the command line, through a resume, and with adapters; and nothing is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from vllm_world import recipe, servers

from opd.config.recipe import to_yaml
from opd.reporting.record import read_metrics

pytestmark = pytest.mark.timeout(400)


def start(config: object, folder: Path, *words: str) -> subprocess.Popen[str]:
    file = folder / "recipe.yaml"
    file.write_text(to_yaml(config))  # pyright: ignore[reportArgumentType]
    command = [sys.executable, "-c", "from opd.cli.main import main; import sys; sys.exit(main())", "train", str(file)]
    return subprocess.Popen([*command, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=300)
    assert not servers(), "a server or a child of it is left"
    return said


def test_a_run_from_the_command_line_ends_well_and_its_samples_are_on_policy(world: Path, tmp_path: Path):
    config = recipe(world, tmp_path / "run", eval__every=5, student__lora__rank=4, train__steps=5)
    process = start(config, tmp_path)
    said = finished(process)
    assert process.returncode == 0, said
    assert "vLLM: starting a server" in said and "vLLM: ready at http://127.0.0.1:" in said
    records = read_metrics(tmp_path / "run")
    steps = [r.metrics for r in records if r.kind == "step"]
    assert len(steps) == 5 and all(step["sampler_student_gap"] < 1e-4 for step in steps)
    evals = [r for r in records if r.kind == "eval" and r.who == "student"]
    assert [r.step for r in evals] == [0, 5]
    assert "key" not in yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["rollout"]["vllm"]


def wait_for_steps(process: subprocess.Popen[str], run_dir: Path, count: int) -> None:
    until = time.monotonic() + 200
    metrics = run_dir / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)


def test_a_run_that_was_killed_leaves_no_server_goes_on_and_stops_at_a_signal(world: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    config = recipe(world, run_dir, train__steps=3000, checkpoint__every=1)
    process = start(config, tmp_path)
    wait_for_steps(process, run_dir, 3)
    process.kill()
    process.communicate()
    until = time.monotonic() + 20
    while servers() and time.monotonic() < until:
        time.sleep(0.2)
    assert not servers(), "SIGKILL of the run left its server"
    done = len(read_metrics(run_dir))
    again = start(config, tmp_path, "--resume")
    wait_for_steps(again, run_dir, done + 4)
    os.kill(again.pid, signal.SIGTERM)
    said = finished(again)
    assert again.returncode == 128 + signal.SIGTERM and "--resume" in said and "not the same bits" in said, said
    steps = [r for r in read_metrics(run_dir) if r.kind == "step"]
    assert [r.step for r in steps] == list(range(len(steps))) and len(steps) >= done + 3
    assert all(r.metrics["sampler_student_gap"] < 1e-4 for r in steps)

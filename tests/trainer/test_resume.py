"""A run killed at any moment and resumed ends bit for bit as the uninterrupted one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opd.config.recipe import build, merge
from opd.errors import RunFolderError
from opd.trainer.run import train
from worlds import settings

SCRIPT = Path(__file__).with_name("kill_and_resume.py")


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "student" / "model.safetensors")


def records(run_dir: Path, name: str) -> list[dict]:
    """Every line, without what wall clocks measured."""
    rows = [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
    for row in rows:
        row["metrics"] = {k: v for k, v in row.get("metrics", {}).items() if not k.startswith("time/")}
    return rows


def assert_same_run(run_dir: Path, reference: Path) -> None:
    ours, theirs = weights(run_dir), weights(reference)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours), f"weights of {run_dir.name} differ"
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert records(run_dir, name) == records(reference, name), f"{name} of {run_dir.name} differs"


def write_recipe(path: Path, values: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump(merge({}, values)))
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "optimizer", ["muon", *(pytest.param(name, marks=pytest.mark.endurance) for name in ("adamw", "natural_gradient"))]
)
def test_twenty_kills_at_random_moments_change_nothing(world, tmp_path, optimizer):
    kills = 20 if optimizer == "adamw" else 5
    more = {"train__steps": 30, "optimizer__name": optimizer, "optimizer__schedule": "cosine", "rollout__lmbda": 0.7}
    recipe = write_recipe(tmp_path / "recipe.yaml", settings(world, tmp_path / "unused", **more))
    outcome = subprocess.run(
        [sys.executable, str(SCRIPT), str(recipe), str(tmp_path / "reference"), str(tmp_path), str(kills), "0"],
        capture_output=True,
        text=True,
        timeout=800,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    result = json.loads(outcome.stdout.splitlines()[-1])
    assert result["kills"] >= kills
    assert len(set(result["checkpoint_at_kill"])) >= 3, "the kills must fall in different phases of the run"
    for chain in result["chains"]:
        assert_same_run(Path(chain), tmp_path / "reference")


def run_in_fork(values: dict[str, object], *, die_at: str | None) -> int:
    """Train in a forked process; with `die_at`, SIGKILL itself at that point."""
    pid = os.fork()
    if pid == 0:
        if die_at is not None:
            _arm(die_at)
        train(build(merge({}, values)), resume=True)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _arm(point: str) -> None:
    from opd.trainer import checkpoint, saving

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    calls = {"count": 0}

    def on_second_checkpoint_after(original):
        """The original function; at its second call it is cut short by a kill."""

        def wrapped(data: object, path: Path) -> object:
            calls["count"] += 1
            if calls["count"] == 2:
                path.write_bytes(b"half")
                die()
            return original(data, path)

        return wrapped

    if point == "checkpoint written, not yet renamed":
        publish = checkpoint.publish
        checkpoint.publish = lambda temporary, final: (
            die() if final.name == "step-00000004" else publish(temporary, final)
        )
    elif point == "half of the checkpoint written":
        checkpoint.torch.save = on_second_checkpoint_after(torch.save)
    elif point == "student saved, not yet renamed":
        saving.publish = die
    elif point == "between update and record":
        from opd.reporting.record import RunRecorder

        original, seen = RunRecorder.step, []
        RunRecorder.step = lambda self, step, metrics: (
            die() if step == 5 else seen.append(original(self, step, metrics))
        )


@pytest.mark.parametrize(
    "point",
    [
        "half of the checkpoint written",
        "checkpoint written, not yet renamed",
        "between update and record",
        "student saved, not yet renamed",
    ],
)
def test_a_kill_at_the_worst_moments_changes_nothing(world, tmp_path, point):
    train(build(merge({}, settings(world, tmp_path / "reference"))))
    values = settings(world, tmp_path / "killed")
    assert run_in_fork(values, die_at=point) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "student").exists()
    train(build(merge({}, values)), resume=True)
    assert_same_run(tmp_path / "killed", tmp_path / "reference")


def test_the_same_recipe_gives_the_same_run_and_another_seed_another(world, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        train(build(merge({}, settings(world, tmp_path / name, seed=seed))))
    assert_same_run(tmp_path / "one", tmp_path / "two")
    a, b = weights(tmp_path / "one"), weights(tmp_path / "three")
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_resuming_a_finished_run_changes_nothing(world, tmp_path):
    values = settings(world, tmp_path / "run")
    train(build(merge({}, values)))
    before = {p.name: p.read_bytes() for p in (tmp_path / "run" / "student").iterdir()}
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    train(build(merge({}, values)), resume=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run" / "student").iterdir()} == before
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_resuming_with_another_model_at_the_same_path_is_refused(world, tmp_path, who):
    shutil.copytree(world / who, tmp_path / who)
    values = settings(world, tmp_path / "run") | {f"{who}.model": str(tmp_path / who)}
    train(build(merge({}, values)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / who)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.001)
    model.save_pretrained(tmp_path / who)
    with pytest.raises(RunFolderError, match=rf"The {who}'s .*weights differ"):
        train(build(merge({}, values)), resume=True)


def test_only_the_newest_checkpoints_are_kept(world, tmp_path):
    train(build(merge({}, settings(world, tmp_path / "run", checkpoint__keep=2))))
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000006", "step-00000008"]

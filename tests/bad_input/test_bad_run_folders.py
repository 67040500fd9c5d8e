"""Run folders that are taken, locked, unwritable or not what --resume needs. An old run is never lost, never mixed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from opd_user import User

from opd.reporting.record import read_metrics

HOLD_LOCK = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"


def test_a_folder_that_holds_a_run_is_never_mixed(user: User):
    before = user.has_finished_run()
    outcome = user.train(optimizer__lr=0.5)
    outcome.refuses("already holds a run", "metrics.jsonl", "--resume", "--overwrite", "--run_dir PATH")
    assert user.files() == before


@pytest.mark.parametrize("left", ["metrics.jsonl", "student", "checkpoints"])
def test_a_part_of_a_run_is_enough_to_be_taken(user: User, left: str):
    source = user.desk.finished_run / left
    user.run_dir.mkdir()
    shutil.copytree(source, user.run_dir / left) if source.is_dir() else shutil.copy(source, user.run_dir)
    before = user.files()
    user.train().refuses("already holds a run", left)
    user.train("--resume").refuses(f"holds {left} but no config.yaml", "Restore that file", "--run_dir PATH")
    assert user.files() == before


def test_overwrite_replaces_the_run_and_leaves_files_that_are_not_its_own(user: User):
    before = user.has_finished_run()
    (user.run_dir / "notes.txt").write_text("mine")
    (user.run_dir / "adapter").mkdir()
    (user.run_dir / "adapter" / "adapter_config.json").write_text("of the old run")
    user.train("--overwrite", train__steps=1).succeeds()
    after = user.files()
    assert after["notes.txt"] == b"mine"
    assert [record.step for record in read_metrics(user.run_dir)] == [0]
    assert "checkpoints/step-00000002/state.json" in before.keys() - after.keys()
    assert "adapter/adapter_config.json" not in after


@pytest.mark.parametrize(
    "mistake",
    [
        ("--train.stepz", "3"),
        ("--student.model", "./nowhere"),
        ("--prompts.path", "nowhere.jsonl"),
        ("--prompts.prompt_column", "question"),
        ("--objective.beta", "0.9"),
        ("--teacher.supply", "top_k"),
        ("--rollout.max_new_tokens", "100"),
        ("--rollout.lmbda", "0.5"),
        ("--student.device", "cuda:99"),
    ],
    ids=lambda words: words[0],
)
def test_overwrite_with_a_recipe_that_cannot_run_costs_nothing(user: User, mistake: tuple[str, str]):
    before = user.has_finished_run()
    assert user.train("--overwrite", *mistake).code == 1
    assert user.files() == before


@pytest.mark.parametrize("key", ["student.model", "teacher.model", "prompts.path"])
def test_a_run_never_deletes_its_own_input(user: User, key: str):
    before = user.has_finished_run()
    own = user.run_dir / ("samples.jsonl" if key == "prompts.path" else "student")
    for switch in ("--overwrite", "--resume"):
        user.train(switch, f"--{key}", own).refuses(f"{key}='{own}'", "write its own", "--run_dir PATH")
    assert user.files() == before


def test_a_folder_below_a_file_cannot_be_written(user: User):
    file = user.writes("file", "mine")
    outcome = user.opd("train", user.desk.recipe, "--run_dir", f"{file}/run")
    outcome.refuses(
        "Cannot write to the run folder", f"{file}/run", "Not a directory", "Check the spelling of the path"
    )
    outcome = user.opd("train", user.desk.recipe, "--run_dir", file)
    outcome.refuses(f"'{file}' is a file", "a run needs a folder", "--run_dir PATH")
    assert Path(file).read_text() == "mine"


@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="needs a file system that refuses even root")
def test_a_folder_without_permission_cannot_be_written(user: User):
    outcome = user.opd("train", user.desk.recipe, "--run_dir", "/sys/kernel/opd-run")
    outcome.refuses("Cannot write to the run folder /sys/kernel/opd-run", "Choose a run folder that you may write to")


def test_two_processes_cannot_share_a_folder(user: User):
    before = user.has_finished_run()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(user.run_dir / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        for switch in ("--resume", "--overwrite"):
            user.train(switch).refuses("Another process is writing", "Wait for it", "--run_dir PATH")
        other.communicate()
    assert user.files() == before
    user.train("--resume").succeeds()


def test_resume_with_another_recipe_shows_what_differs(user: User):
    before = user.has_run_killed_in_step_2()
    words = {"optimizer__lr": 0.5, "train__steps": 3, "log__samples": 1}
    outcome = user.train("--resume", seed=7, objective__divergence="forward_kl", **words)
    outcome.refuses(
        "started with another recipe",
        "seed: 0 → 7",
        "objective.divergence: 'reverse_kl' → 'forward_kl'",
        "a new --run_dir",
    )
    assert "log.samples" not in outcome.message and "optimizer.lr" not in outcome.message
    assert user.files() == before
    outcome = user.train("--resume", **words)
    outcome.succeeds()
    assert "changed from here on: log.samples: 4 → 1; optimizer.lr: 1e-05 → 0.5; train.steps: 2 → 3" in outcome.out


@pytest.mark.parametrize("which", ["prompts.path", "prompts.eval_path"])
def test_resume_with_other_prompts_in_the_same_file_is_refused(user: User, which: str):
    rows = [{"prompt": f"{i}>", "answer": str(i)} for i in range(4)]
    path = user.writes_prompts(*rows)
    words = (f"--{which}", path, "--eval.every", "2", "--log.samples", "0")
    user.train(*words).succeeds()
    before = user.files()
    user.writes_prompts(*rows[:-1], {"prompt": "9>", "answer": "9"})
    outcome = user.train("--resume", *words)
    outcome.refuses("prompts differ", "would not continue the same run", "Restore them", "--run_dir")
    assert user.files() == before


def test_resume_with_a_saved_recipe_that_cannot_be_read_is_refused(user: User):
    user.has_run_killed_in_step_2()
    for spoilt in (b"train: [1\n", b"\xff\xfe\x00", b""):
        (user.run_dir / "config.yaml").write_bytes(spoilt)
        before = user.files()
        user.train("--resume").refuses("config.yaml' cannot be read", "Restore the recipe", "a new --run_dir")
        assert user.files() == before


def test_resume_of_a_finished_run_without_checkpoints_does_not_train_it_away(user: User):
    user.has_finished_run()
    shutil.rmtree(user.run_dir / "checkpoints")
    before = user.files()
    user.train("--resume").refuses("finished student and no checkpoint", "nothing to resume", "--overwrite")
    assert user.files() == before


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state.json", _cut),
        ("state.json", lambda path: path.write_text("{")),
        ("state.json", lambda path: path.write_text("[1]")),
        ("state.json", lambda path: path.write_text('{"format": 1}')),
        ("weights.safetensors", _cut),
        ("weights.safetensors", lambda path: path.unlink()),
        ("optimizer.pt", _cut),
        ("optimizer.pt", lambda path: path.write_bytes(b"")),
        ("optimizer.pt", lambda path: path.write_bytes(b"not a checkpoint at all")),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_resumes(user: User, name: str, damage):
    user.has_finished_run()
    newest = user.run_dir / "checkpoints" / "step-00000002"
    if damage is _cut and name == "state.json":
        (newest / name).write_text("{" * 200)
    damage(newest / name)
    before = user.files()
    outcome = user.train("--resume")
    outcome.refuses(f"Checkpoint '{newest}' cannot be read", "cut short or edited", "Delete that folder to resume")
    assert user.files() == before


def test_after_a_damaged_checkpoint_is_deleted_the_run_ends_as_it_would_have(user: User):
    user.has_finished_run()
    shutil.rmtree(user.run_dir / "checkpoints" / "step-00000002")
    user.train("--resume").succeeds()
    finished = (user.desk.finished_run / "student" / "model.safetensors").read_bytes()
    assert user.files()["student/model.safetensors"] == finished


def test_a_checkpoint_of_another_version_or_another_model_is_refused(user: User):
    user.has_finished_run()
    newest = user.run_dir / "checkpoints" / "step-00000002"
    state = (newest / "state.json").read_text()
    (newest / "state.json").write_text(state.replace('"format": 1', '"format": 99'))
    user.train("--resume").refuses("has format 99", "reads 1", "Resume with the version that wrote it")
    (newest / "state.json").write_text(state)
    weights = newest / "weights.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"up_proj", b"xy_proj"))
    user.train("--resume").refuses("is of another model", "Resume with the recipe it was made with")

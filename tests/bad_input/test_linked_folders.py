"""Links, moved folders and odd characters in the paths of a run. Nothing behind a link is deleted; nothing is half deleted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from opd_user import User

from opd.errors import RunFolderError
from opd.reporting.record import read_metrics
from opd.trainer.run_folder import OWN_NAMES, RunFolder

ODD = [
    "[a-b]*",
    "[/red] [bold]x",
    "a b\tc",
    "100%s {x}",
    "naïve ☂ «é»",
    "-rf",
    'it\'s "q" $HOME `id`',
    "#1;&",
    "line\nbreak",
]


def moved_behind_a_link(user: User, name: str) -> Path:
    """`name` of the finished run on another disk, as people do with checkpoints; the link is left in its place."""
    disk = user.folder / "disk"
    disk.mkdir(exist_ok=True)
    target = disk / name
    shutil.move(user.run_dir / name, target)
    (user.run_dir / name).symlink_to(target)
    return target


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def same_as_finished(user: User) -> bool:
    student = user.desk.finished_run / "student" / "model.safetensors"
    return (user.run_dir / "student" / "model.safetensors").read_bytes() == student.read_bytes()


@pytest.mark.parametrize("name", ["checkpoints", "student", "metrics.jsonl", "config.yaml"])
def test_overwrite_takes_a_link_away_and_leaves_what_it_leads_to(user: User, name: str):
    user.has_finished_run()
    target = moved_behind_a_link(user, name)
    before = tree(user.folder / "disk")
    outcome = user.train("--overwrite")
    outcome.succeeds()
    assert f"{name} was a link to {target}; the link is gone, and what it leads to is untouched" in outcome.out
    assert tree(user.folder / "disk") == before
    assert not (user.run_dir / name).is_symlink() and same_as_finished(user)


def test_a_link_to_an_empty_folder_is_filled(user: User):
    for name in ("checkpoints", "student"):
        (user.folder / "disk" / name).mkdir(parents=True)
        user.run_dir.mkdir(exist_ok=True)
        (user.run_dir / name).symlink_to(user.folder / "disk" / name)
    for flags in ((), ("--resume",)):
        user.train(*flags).succeeds()
        assert (user.run_dir / "checkpoints").is_symlink()
        assert sorted(p.name for p in (user.folder / "disk" / "checkpoints").iterdir()) == [
            "step-00000001",
            "step-00000002",
        ]
        assert same_as_finished(user)
    assert (user.folder / "disk" / "student" / "model.safetensors").exists()


def test_resume_reads_and_writes_checkpoints_through_a_link(user: User):
    user.has_run_killed_in_step_2()
    target = moved_behind_a_link(user, "checkpoints")
    user.train("--resume").succeeds()
    assert (target / "step-00000002" / "state.json").exists() and same_as_finished(user)


def test_a_single_checkpoint_that_is_a_link_is_pruned_and_its_target_stays(user: User):
    user.has_run_killed_in_step_2()
    link = user.run_dir / "checkpoints" / "step-00000001"
    shutil.move(link, user.folder / "kept")
    link.symlink_to(user.folder / "kept")
    user.train("--resume", checkpoint__keep=1).succeeds()
    assert not link.is_symlink() and (user.folder / "kept" / "state.json").exists()


@pytest.mark.parametrize("flag", ["--resume", None])
def test_a_link_to_a_disk_that_is_not_there_is_named_and_nothing_is_lost(user: User, flag: str | None):
    user.has_run_killed_in_step_2()
    target = moved_behind_a_link(user, "checkpoints")
    target.rename(user.folder / "unmounted")
    before = user.files()
    flags = () if flag is None else (flag,)
    user.train(*flags).refuses(
        f"checkpoints' is a link to '{target}', which is not there", "on a disk that is not mounted", "Bring it back"
    )
    assert user.files() == before
    (user.folder / "unmounted").rename(target)
    user.train("--resume").succeeds()
    assert same_as_finished(user)


def test_overwrite_replaces_a_link_to_nothing(user: User):
    user.has_finished_run()
    shutil.rmtree(moved_behind_a_link(user, "checkpoints"))
    user.train("--overwrite").succeeds()
    assert not (user.run_dir / "checkpoints").is_symlink() and same_as_finished(user)


def test_checkpoints_that_were_moved_away_do_not_cost_the_records(user: User):
    user.has_run_killed_in_step_2()
    shutil.copy(user.desk.finished_run / "metrics.jsonl", user.run_dir)
    (user.run_dir / "checkpoints").rename(user.folder / "elsewhere")
    before = user.files()
    user.train("--resume").refuses(
        "has records of 2 steps", "written every 1", "Put them back there to resume", "--overwrite"
    )
    assert user.files() == before
    (user.folder / "elsewhere").rename(user.run_dir / "checkpoints")
    user.train("--resume").succeeds()


def test_a_run_folder_that_is_a_link_to_nothing_is_named(user: User):
    user.run_dir.symlink_to(user.folder / "gone")
    user.train().refuses(
        f"'{user.run_dir}' is a link to '{user.folder / 'gone'}', which is not there", "remove the link"
    )
    nested = user.folder / "gone"
    user.opd("train", user.desk.recipe, "--run_dir", user.run_dir / "below").refuses(f"is a link to '{nested}'")
    user.run_dir.unlink()
    user.train().succeeds()


def test_a_run_folder_that_is_a_link_is_used_and_overwritten(user: User):
    user.has_finished_run()
    user.run_dir.rename(user.folder / "real")
    user.run_dir.symlink_to(user.folder / "real")
    user.train("--overwrite").succeeds()
    assert user.run_dir.is_symlink() and same_as_finished(user)


def test_a_lock_that_is_a_link_does_not_empty_a_file(user: User):
    user.has_finished_run()
    kept = Path(user.writes("kept", "mine"))
    (user.run_dir / ".lock").unlink(missing_ok=True)
    (user.run_dir / ".lock").symlink_to(kept)
    user.train("--overwrite").succeeds()
    assert kept.read_text() == "mine"


def test_overwrite_that_fails_half_way_puts_everything_back(user: User, monkeypatch: pytest.MonkeyPatch):
    """A name that cannot be moved: a mounted disk, an immutable file."""
    before = user.has_finished_run()
    rename = os.rename

    def refuse_one(source: object, target: object) -> None:
        if Path(str(source)).name == "checkpoints":
            raise OSError(16, "Device or resource busy")
        rename(source, target)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(os, "rename", refuse_one)
    user.train("--overwrite").refuses("Cannot replace the run", "busy", "Empty it by hand")
    assert user.files() == before
    assert not [path for path in user.run_dir.iterdir() if path.name.startswith(".replaced-")]


def test_overwrite_without_room_for_the_new_config_puts_everything_back(user: User):
    from test_full_disks import room_for_files_of

    before = user.has_finished_run()
    with room_for_files_of(100):
        user.train("--overwrite").refuses("File too large", "Free some space")
    assert user.files() == before


def test_a_logger_that_cannot_start_costs_no_old_run(user: User, monkeypatch: pytest.MonkeyPatch):
    from opd.trainer import lifecycle

    before = user.has_finished_run()

    def refuse(*_: object, **__: object) -> list[object]:
        (user.run_dir / "tensorboard").write_text("half made")
        raise RunFolderError("the logger is not there")

    monkeypatch.setattr(lifecycle, "open_sinks", refuse)
    user.train("--overwrite").refuses("the logger is not there")
    assert user.files() == before


def test_what_a_killed_overwrite_left_aside_is_deleted_by_the_next(user: User):
    user.has_finished_run()
    left = user.run_dir / ".replaced-abc"
    left.mkdir()
    (left / "metrics.jsonl").write_text("old")
    user.train("--overwrite").succeeds()
    assert not left.exists()


@pytest.mark.parametrize("name", ODD)
def test_odd_characters_in_the_run_folder_and_the_model_s_path_change_nothing(user: User, name: str):
    folder = user.folder / name
    student, prompts = shutil.copytree(user.desk.student, folder / "student"), folder / "p.jsonl"
    shutil.copy(user.desk.prompts, prompts)
    words = (
        "train",
        user.desk.recipe,
        f"--student.model={student}",
        f"--prompts.path={prompts}",
        f"--run_dir={folder / 'run'}",
    )
    user.opd(*words, "--train.steps", 1).succeeds()
    outcome = user.opd(*words, "--resume")
    outcome.succeeds()
    assert f"student: {folder / 'run' / 'student'}" in outcome.out
    assert len(read_metrics(folder / "run")) == 2
    user.opd(*words, "--overwrite").succeeds()
    made = (folder / "run" / "student" / "model.safetensors").read_bytes()
    assert made == (user.desk.finished_run / "student" / "model.safetensors").read_bytes()


def test_an_empty_folder_holds_no_run(tmp_path: Path):
    for name in OWN_NAMES:
        (tmp_path / name).mkdir()
    assert RunFolder(tmp_path).taken_by() == []

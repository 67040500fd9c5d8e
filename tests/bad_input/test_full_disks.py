"""A disk without room: a limit on the size of a file makes every real write beyond it fail, as a full disk does."""

from __future__ import annotations

import json
import resource
import shlex
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from opd_user import User

STUDENT_FILES = ("student/model.safetensors", "student/config.json", "student/tokenizer.json")


def allow_files_of(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextmanager
def room_for_files_of(size: int) -> Iterator[None]:
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    allow_files_of(size)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)


# bytes: the weights take 11.5 kB and the optimizer's state 32 kB
@pytest.mark.parametrize(("size", "file"), [(8_000, "weights"), (16_000, "optimizer")])
def test_a_checkpoint_without_room_costs_nothing_and_resume_finishes(user: User, size: int, file: str):
    before = user.has_run_killed_in_step_2()
    with room_for_files_of(size):
        outcome = user.train("--resume")
    outcome.refuses(
        "Checkpoint step-00000002 cannot be written", "Earlier checkpoints are untouched", "Free some space", "--resume"
    )
    left = user.files()
    kept = {name for name in before if name.startswith("checkpoints/")}
    assert {name for name in left if name.startswith("checkpoints/")} == kept
    assert all(left[name] == before[name] for name in kept)
    user.train("--resume").succeeds()
    _ended_as_if_nothing_had_happened(user)


def test_a_student_without_room_can_be_saved_later(user: User):
    user.has_finished_run()
    before = user.files()
    with room_for_files_of(8_000):
        outcome = user.train("--resume")
    outcome.refuses("Cannot save the student", "Free some space", "--resume")
    assert {name: user.files()[name] for name in STUDENT_FILES} == {name: before[name] for name in STUDENT_FILES}
    user.train("--resume").succeeds()
    _ended_as_if_nothing_had_happened(user)


def test_a_disk_too_full_for_the_logs_is_named(user: User):
    with room_for_files_of(300):
        outcome = user.train()
    outcome.refuses("Cannot write", str(user.run_dir), "File too large", "Free some space")


def test_a_report_without_room_is_a_warning_with_advice_that_works(user: User):
    with room_for_files_of(40_000):
        outcome = user.train(log__progress="plain")
    outcome.succeeds()
    (warning,) = [line for line in outcome.out.splitlines() if line.startswith("warning: The report")]
    for fragment in ("report.html", "File too large", "Free some space", "The run itself is not affected"):
        assert fragment in warning
    assert not [line for line in outcome.out.splitlines() if line.startswith("report:")]
    assert "report.html" not in user.files()
    _ended_as_if_nothing_had_happened(user)
    assert json.loads(user.files()["state.json"])["name"] == "finished"
    _, *advice = shlex.split(warning.partition("write it later with: ")[2])
    user.opd(*advice).succeeds()
    assert "report.html" in user.files()


@pytest.mark.slow
def test_a_full_disk_shows_no_traceback_in_a_real_process(user: User):
    user.has_run_killed_in_step_2()
    outcome = user.train_in_shell("--resume", preexec=lambda: allow_files_of(16_000))
    outcome.refuses("Checkpoint step-00000002 cannot be written", "Free some space", "--resume")


def _ended_as_if_nothing_had_happened(user: User) -> None:
    student = (user.desk.finished_run / "student" / "model.safetensors").read_bytes()
    assert user.files()["student/model.safetensors"] == student

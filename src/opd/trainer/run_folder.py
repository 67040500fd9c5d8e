"""The run folder: never two runs in one, never a run lost by accident."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from opd.config import Config
from opd.config.recipe import to_yaml
from opd.errors import RunFolderError
from opd.reporting.files import (
    ABOUT_FILE,
    GUARD_FILE,
    STATE_FILE,
    dangling_link,
    explain_link,
    explain_os_errors,
    remove,
    write_atomically,
)
from opd.reporting.record import HISTORY_FILE, METRICS_FILE, read_metrics
from opd.trainer.checkpoint import checkpoints
from opd.trainer.resume import Change, check_same_run, compare, read_saved

OWN_NAMES = (
    "config.yaml",
    METRICS_FILE,
    "samples.jsonl",
    "summary.json",
    "report.html",
    HISTORY_FILE,
    "checkpoints",
    "student",
    "adapter",
    "tensorboard",
    "wandb_run_id",
    GUARD_FILE,
    ABOUT_FILE,
    STATE_FILE,
)
SAYS_LITTLE = (ABOUT_FILE, STATE_FILE)
"""Files that a run may leave which was killed while its models loaded: by themselves they are no run."""
ASIDE = ".replaced-"


class RunFolder:
    """Paths of one run. `open_run` makes or checks it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.student = self.path / "student"
        self.changes: Mapping[str, Change] = {}
        """With --resume: what differs from the recipe that the run was started with."""
        self.begun = False
        """True once `begin` has written this run into the folder."""

    def taken_by(self) -> list[str]:
        """Files and folders of a run that are already there. An empty folder, or a link to one, holds nothing."""
        names = [name for name in OWN_NAMES if name not in SAYS_LITTLE]
        return [name for name in names if _holds_something(self.path / name)]

    @contextmanager
    def begin(self, config: Config, *, step: int | None) -> Iterator[list[str]]:
        """Write the resolved config and a line of history, and give what a person should be told. `step` is the number of updates
        that a resumed run has; None starts afresh, in the place of what an earlier run left.

        The old run steps aside by renames, which are undone if the block raises, and is deleted at its end: the block does what may
        still fail, such as connecting to a logger, so that nothing that cannot start costs an old run.
        """
        told = self._links() if step is None else []
        aside, moved = (None, []) if step is not None else self._step_aside()
        try:
            self.begun = True
            write_atomically(self.config, to_yaml(config).encode())
            self._write_history(step)
            yield told
        except BaseException:
            if aside is not None:
                self._step_back(aside, moved)
                self.begun = False
            raise
        if aside is not None:
            shutil.rmtree(
                aside, ignore_errors=True
            )  # of links, the links alone; what stays is deleted by the next start

    def _write_history(self, step: int | None) -> None:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "step": step or 0,
            "changed": {} if step is None else {key: list(change) for key, change in self.changes.items()},
        }
        place = self.path / HISTORY_FILE
        with explain_os_errors("write the history of the run to", place), open(place, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")

    def _links(self) -> list[str]:
        """Notes about links that an overwriting run takes away."""
        names = [name for name in OWN_NAMES if (self.path / name).is_symlink()]
        return [
            f"{self.path / name} was a link to {os.readlink(self.path / name)}; the link is gone, and what it leads to is untouched."
            for name in names
            if _holds_something(self.path / name) or dangling_link(self.path / name)
        ]

    def _step_aside(self) -> tuple[Path, list[str]]:
        """Move everything of an old run into a hidden folder beside it; all of it, or nothing."""
        moved: list[str] = []
        with explain_os_errors("replace the run in", self.path):
            for left in self.path.iterdir():  # of a process that was killed here
                if left.name.startswith(ASIDE):
                    remove(left)
            aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=self.path))
            try:
                for name in OWN_NAMES:
                    if _holds_something(self.path / name) or dangling_link(self.path / name):
                        os.rename(self.path / name, aside / name)
                        moved.append(name)
            except BaseException:
                self._put_back(aside, moved)
                raise
        return aside, moved

    def _step_back(self, aside: Path, moved: Sequence[str]) -> None:
        """Undo `_step_aside`: what was written meanwhile goes, except into folders that were there and empty."""
        for name in OWN_NAMES:
            if name in moved or (self.path / name).is_file():
                remove(self.path / name)
        self._put_back(aside, moved)

    def _put_back(self, aside: Path, moved: Sequence[str]) -> None:
        for name in moved:
            os.rename(aside / name, self.path / name)
        aside.rmdir()


@contextmanager
def open_run(config: Config, *, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
    """The folder, locked against a second process and checked; nothing in it is changed until `begin`.

    Raises RunFolderError when it is taken, unwritable, or was started with another recipe.
    """
    folder = RunFolder(config.run_dir)
    if resume and overwrite:
        raise RunFolderError("--resume continues a run and --overwrite deletes it; give one of the two.")
    if folder.path.exists() and not folder.path.is_dir():
        raise RunFolderError(
            f"'{folder.path}' is a file, and a run needs a folder; choose another one with --run_dir PATH."
        )
    _refuse_inputs_inside(folder, config)
    with explain_os_errors("write to the run folder", folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)
        lock = open(folder.path / ".lock", "a")  # noqa: SIM115 - held for the whole run; "a", because a link may lead anywhere
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunFolderError(
                f"Another process is writing to '{folder.path}'. Wait for it, or choose another folder with --run_dir PATH."
            ) from None
        _check_taken(folder, config, resume=resume, overwrite=overwrite)
        yield folder


def _check_taken(folder: RunFolder, config: Config, *, resume: bool, overwrite: bool) -> None:
    """Raise RunFolderError unless this run may be in this folder; with `resume`, note what has changed."""
    broken = next((link for name in OWN_NAMES if (link := dangling_link(folder.path / name))), None)
    if broken is not None and not overwrite:
        raise RunFolderError(f"'{folder.path}' is not whole: {explain_link(broken)}")
    taken = folder.taken_by()
    if resume and folder.config.exists():
        saved = read_saved(folder.config)
        folder.changes = compare(saved, config)
        found = checkpoints(folder.checkpoints)
        check_same_run(folder.changes, config, str(folder.path), has_checkpoint=bool(found))
        if not found:
            _refuse_lost_checkpoints(folder, saved)
    elif resume and taken:
        raise RunFolderError(
            f"'{folder.path}' holds {', '.join(taken)} but no config.yaml, so what to resume cannot be told. Restore that file, "
            "or choose another folder with --run_dir PATH."
        )
    elif taken and not overwrite:
        raise RunFolderError(
            f"'{folder.path}' already holds a run ({', '.join(taken)}). Continue it with --resume, replace it with "
            "--overwrite, or choose another folder with --run_dir PATH."
        )


def _refuse_lost_checkpoints(folder: RunFolder, saved: Mapping[str, object]) -> None:
    """A run without a checkpoint starts at step 0 and loses its records: right after an early kill, and not when the checkpoints are
    somewhere else, on a disk that is not mounted say."""
    section = saved.get("checkpoint")
    every = section.get("every") if isinstance(section, dict) else None
    done = sum(record.kind == "step" for record in read_metrics(folder.path))
    if folder.student.exists() or not isinstance(every, int) or not 0 < every < done:
        return
    raise RunFolderError(
        f"'{folder.path}' has records of {done} steps and a checkpoint was written every {every}, but there is none in "
        f"'{folder.checkpoints}'. Put them back there to resume, or start again with --overwrite."
    )


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _refuse_inputs_inside(folder: RunFolder, config: Config) -> None:
    """A run writes these names and --overwrite deletes them; a model or prompts there would be lost."""
    inputs = {
        "student.model": config.student.model,
        "prompts.path": config.prompts.path,
        "prompts.eval_path": config.prompts.eval_path,
    }
    for name, teacher in config.all_teachers.items():
        inputs["teacher.model" if config.teacher else f"teachers.{name}.model"] = teacher.model or None
    for key, value in inputs.items():
        for name in OWN_NAMES if value else ():
            own = (folder.path / name).resolve()
            if own.exists() and Path(str(value)).resolve().is_relative_to(own):
                raise RunFolderError(
                    f"{key}='{value}' lies in '{folder.path}', where this run would write its own {name} over it. Choose another folder "
                    "with --run_dir PATH."
                )

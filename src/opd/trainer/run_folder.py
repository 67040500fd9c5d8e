"""The run folder: never two runs in one, never a run lost by accident."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from opd.config import Config
from opd.errors import RunFolderError
from opd.recipe import to_dict, to_yaml
from opd.reporting.files import explain_os_errors, write_atomically

OWN_NAMES = (
    "config.yaml",
    "metrics.jsonl",
    "samples.jsonl",
    "summary.json",
    "report.html",
    "checkpoints",
    "student",
    "adapter",
    "tensorboard",
    "wandb_run_id",
)
MAY_CHANGE_ON_RESUME = ("log.", "checkpoint.", "run_dir")


class RunFolder:
    """Paths of one run. `open_run` makes or checks it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.student = self.path / "student"

    def taken_by(self) -> list[str]:
        """Files and folders of a run that are already there."""
        return [name for name in OWN_NAMES if (self.path / name).exists()]

    def begin(self, config: Config, *, fresh: bool) -> None:
        """Write the resolved config; a fresh start first removes what an earlier run left. Called when everything else is ready, so
        that a recipe that cannot run never costs an old run."""
        with explain_os_errors("write to the run folder", self.path):
            for name in self.taken_by() if fresh else ():
                target = self.path / name
                shutil.rmtree(target) if target.is_dir() else target.unlink()
        write_atomically(self.config, to_yaml(config).encode())


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
        lock = open(folder.path / ".lock", "w")  # noqa: SIM115 - held for the whole run
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunFolderError(
                f"Another process is writing to '{folder.path}'. Wait for it, or choose another folder with --run_dir PATH."
            ) from None
        taken = folder.taken_by()
        if resume and folder.config.exists():
            _check_same_recipe(folder, config)
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
        yield folder


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


def _check_same_recipe(folder: RunFolder, config: Config) -> None:
    try:
        saved = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
        if not isinstance(saved, dict):
            raise ValueError("it is not a recipe")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunFolderError(
            f"'{folder.config}' cannot be read: {error}. Restore the recipe the run was started with, or start a new --run_dir."
        ) from error
    old, new = _flat(saved), _flat(to_dict(config))
    changed = [
        f"{key}: {old.get(key)!r} → {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and not key.startswith(MAY_CHANGE_ON_RESUME)
    ]
    if changed:
        raise RunFolderError(
            f"'{folder.path}' was started with another recipe, so --resume would not continue the same run: {'; '.join(changed)}. "
            "Use the recipe it was started with, or a new --run_dir."
        )


def _flat(data: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(data, dict):
        return {prefix[:-1]: data}
    flat: dict[str, object] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.")
    return flat

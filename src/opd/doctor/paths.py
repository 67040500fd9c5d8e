"""The files and folders that a recipe names: whether they are there. Imports no torch, so that a wrong path is refused at once."""

from __future__ import annotations

from opd.config.run import RunSettings
from opd.data.rows import read_rows
from opd.folders import MODEL_FILES, check_folder


def check_paths(settings: RunSettings) -> None:
    """Raise DataError or ModelError for a file of prompts or a model's folder that is not there. No file is read, and names on the hub
    are looked up later."""
    prompts = settings.prompts
    read_rows(prompts.path, prompts.split)
    if settings.eval.every > 0 and prompts.eval_path is not None:
        read_rows(prompts.eval_path, prompts.eval_split)
    check_folder("student", settings.student.model, MODEL_FILES)
    for name, teacher in settings.all_teachers.items():
        if teacher.model and not teacher.url:
            check_folder(name if settings.teacher is not None else f"teachers.{name}", teacher.model, MODEL_FILES)

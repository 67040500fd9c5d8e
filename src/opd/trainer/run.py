"""One run, from a config to a folder with a student, its metrics and a report."""

from __future__ import annotations

import importlib.util
import shutil
from typing import Any

from safetensors import SafetensorError

from opd.config import Config
from opd.errors import MissingDependencyError, RunFolderError
from opd.recipe import to_dict
from opd.reporting.files import explain_os_errors
from opd.reporting.progress import Progress
from opd.reporting.record import MetricSink, RunRecorder
from opd.reporting.report import write_report
from opd.reporting.sinks import open_sinks
from opd.reporting.summary import write_summary
from opd.tokenizer import write_own_files
from opd.trainer.checkpoint import checkpoints, load_checkpoint, publish
from opd.trainer.fingerprints import check_same_inputs
from opd.trainer.loop import run_steps
from opd.trainer.records import summarize
from opd.trainer.run_folder import RunFolder, open_run
from opd.trainer.setup import Parts, build_parts


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any] | None:
    """Run a recipe and return its summary (None without evaluation).

    Leaves in `config.run_dir`: config.yaml, metrics.jsonl, samples.jsonl, checkpoints/, student/ (a Hugging Face folder),
    summary.json, report.html. Raises OpdError; the run folder then holds everything up to the last completed step.
    """
    with open_run(config, resume=resume, overwrite=overwrite) as folder:
        _check_sinks(config)
        parts = build_parts(config)
        start = _restore(folder, parts) if resume else None
        folder.begin(config, fresh=start is None)
        with (
            Progress(config.train.steps, start or 0, enabled=config.log.progress) as progress,
            RunRecorder(folder.path, resume_step=start, sinks=_sinks(config, folder, start)) as run,
        ):
            for warning in parts.warnings:
                progress.message(f"warning: {warning}")
            for note in parts.notes:
                progress.message(f"note: {note}")
            if resume:
                found = (
                    "no checkpoint yet, so it starts at step 0" if start is None else f"resuming after {start} steps"
                )
                progress.message(f"{folder.path}: {found}")
            run_steps(config, parts, folder, run, progress)
        save_student(parts, folder)
        summary = summarize(folder.path)
        if summary is not None:
            write_summary(folder.path / "summary.json", summary)
        write_report(folder.path)
        return summary


def _restore(folder: RunFolder, parts: Parts) -> int | None:
    """Load the newest checkpoint; the number of updates it holds, or None when there is none yet."""
    found = checkpoints(folder.checkpoints)
    if not found:
        if folder.student.exists():
            raise RunFolderError(
                f"'{folder.path}' holds a finished student and no checkpoint, so there is nothing to resume. Use --overwrite to run it "
                "again, or another --run_dir."
            )
        return None
    state = load_checkpoint(found[-1], parts.student)
    check_same_inputs(state["inputs"], parts.fingerprints, str(folder.path))
    parts.student_sampler.policy_version = parts.student.version
    return parts.student.version


def save_student(parts: Parts, folder: RunFolder) -> None:
    """The trained student as an ordinary Hugging Face folder; adapters are merged, and kept beside it in adapter/."""
    temporary = folder.path / ".writing-student"
    with explain_os_errors("save the student to", folder.student):
        shutil.rmtree(temporary, ignore_errors=True)
        model: Any = parts.student.model
        if hasattr(model, "merge_and_unload"):
            model.save_pretrained(folder.path / "adapter")
            model = model.merge_and_unload()
        try:
            model.save_pretrained(temporary)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise RunFolderError(
                f"Cannot save the student to {folder.student}: {error}. Free some space, then continue with --resume."
            ) from error
        write_own_files(parts.student_files, temporary)
        publish(temporary, folder.student)


def _check_sinks(config: Config) -> None:
    """Before `begin` removes an old run."""
    for name, wanted in (("tensorboard", config.log.tensorboard), ("wandb", config.log.wandb_project)):
        if wanted and importlib.util.find_spec(name) is None:
            raise MissingDependencyError(
                f"The recipe logs to {name}, which is not installed: pip install 'opd[{name}]', or leave it out of the log section."
            )


def _sinks(config: Config, folder: RunFolder, start: int | None) -> list[MetricSink]:
    names = ["tensorboard"] if config.log.tensorboard else []
    names += ["wandb"] if config.log.wandb_project else []
    return open_sinks(
        names, folder.path, resume_step=start, project=config.log.wandb_project or "opd", config=to_dict(config)
    )

"""One run, from a config to a folder with a student, its metrics and a report."""

from __future__ import annotations

import importlib.util
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from opd.config import Config
from opd.config.recipe import build, to_dict
from opd.errors import ConfigError, MissingDependencyError, RunFolderError
from opd.reporting.files import explain_os_errors
from opd.reporting.progress import Progress
from opd.reporting.record import MetricSink, RunRecorder
from opd.reporting.report import write_report
from opd.reporting.sinks import open_sinks
from opd.reporting.summary import write_summary
from opd.tokenizer import write_own_files
from opd.trainer.checkpoint import behind_link, checkpoints, load_checkpoint, publish, version_of
from opd.trainer.fingerprints import check_same_inputs
from opd.trainer.interrupts import Interrupted, RunStopped, StopRequest
from opd.trainer.loop import run_steps
from opd.trainer.records import summarize
from opd.trainer.resume import continued, described
from opd.trainer.resume import notes as change_notes
from opd.trainer.run_folder import RunFolder, open_run
from opd.trainer.setup import RunComponents, build_parts


def train(
    config: Config | Mapping[str, Any], *, resume: bool = False, overwrite: bool = False
) -> dict[str, Any] | None:
    """Run a recipe, a Config or the dict that would make one, and return its summary (None without evaluation).

    Leaves in `config.run_dir`: config.yaml, metrics.jsonl, samples.jsonl, checkpoints/, student/ (a Hugging Face folder),
    summary.json, report.html. Raises OpdError; the run folder then holds everything up to the last completed step. After SIGINT,
    SIGTERM or SIGHUP it finishes the step, saves a checkpoint and raises RunStopped, a KeyboardInterrupt; a second signal ends it at
    once. A handler of the caller's own is left alone.
    """
    if isinstance(config, Mapping):
        config = build(config)
    if not isinstance(config, Config):
        raise ConfigError(
            f"train() takes an opd.Config or a dict of its sections, not {config!r}; a recipe file is opd.config.recipe.load(PATH)."
        )
    with StopRequest() as stop, open_run(config, resume=resume, overwrite=overwrite) as folder:
        try:
            return _train(config, folder, stop, resume=resume)
        except KeyboardInterrupt:
            raise _stopped(config, folder, stop, resume=resume) from None


def _train(config: Config, folder: RunFolder, stop: StopRequest, *, resume: bool) -> dict[str, Any] | None:
    config, folder.changes = continued(config, folder.changes)
    _check_sinks(config)
    parts = build_parts(config)
    start = _restore(folder, parts, config) if resume else None
    with stop.whole_steps():
        with folder.begin(config, step=start) as notes:
            recorder = RunRecorder(folder.path, resume_step=start, sinks=_sinks(config, folder, start))
        with recorder as run, Progress(config.train.steps, start or 0, enabled=config.log.progress) as progress:
            for warning in parts.warnings:
                progress.message(f"warning: {warning}")
            for note in [
                *(f"note: {note}" for note in parts.notes),
                *notes,
                *(_resumed(folder, start, config) if resume else ()),
            ]:
                progress.message(note)
            try:
                run_steps(config, parts, folder, run, progress, stop)
            except Interrupted:
                write_report(folder.path)
                raise
        save_student(parts, folder)
        summary = summarize(folder.path, config)
        if summary is not None:
            write_summary(folder.path / "summary.json", summary)
        write_report(folder.path)
        return summary


def _resumed(folder: RunFolder, start: int | None, config: Config) -> list[str]:
    """From where a run goes on, and with what changes."""
    if start is None:
        return [f"{folder.path}: no checkpoint yet, so it starts at step 0"]
    lines = [f"{folder.path}: resuming after {start} steps"]
    if changed := described(folder.changes):
        lines.append(f"changed from here on: {changed}")
    return lines + [f"warning: {note}" for note in change_notes(folder.changes, config)]


def _stopped(config: Config, folder: RunFolder, stop: StopRequest, *, resume: bool) -> RunStopped:
    """What a signal left, and how the run goes on."""
    number = stop.signal or signal.SIGINT
    found = checkpoints(folder.checkpoints) if folder.begun or resume else []
    if found:
        finished = folder.begun and stop.signal is not None and not stop.second
        how = "stopped after" if finished else "stopped at once; the last checkpoint has"
        facts = f"{number.name}: {how} {version_of(found[-1])} of {config.train.steps} steps, saved in {found[-1]}."
        return RunStopped(facts, signal_number=number, next="resume")
    if folder.begun:
        facts = f"{number.name}: stopped before a step was saved, so there is nothing to resume."
        return RunStopped(facts, signal_number=number, next="overwrite")
    facts = f"{number.name}: stopped before the first step, and nothing was changed."
    return RunStopped(facts, signal_number=number, next="again")


def _restore(folder: RunFolder, parts: RunComponents, config: Config) -> int | None:
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
    check_same_inputs(state["inputs"], parts.fingerprints, config, folder.changes)
    version = parts.student.version
    if version > config.train.steps:
        raise RunFolderError(
            f"train.steps={config.train.steps}, and the run in '{folder.path}' has {version} steps already. Set train.steps to {version} "
            "to end it here, or to more."
        )
    parts.student_sampler.policy_version = version
    return version


def save_student(parts: RunComponents, folder: RunFolder) -> None:
    """The trained student as an ordinary Hugging Face folder; adapters are merged, and kept beside it in adapter/."""
    final = behind_link(folder.student)
    temporary = final.with_name(f".writing-{final.name}")
    with explain_os_errors("save the student to", folder.student):
        shutil.rmtree(temporary, ignore_errors=True)
        model: Any = parts.student.model
        if hasattr(model, "merge_and_unload"):
            _save_adapter(model, folder.path / "adapter")
            model = model.merge_and_unload()
        try:
            model.save_pretrained(temporary)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise RunFolderError(
                f"Cannot save the student to {folder.student}: {error}. Free some space, then continue with --resume."
            ) from error
        write_own_files(parts.student_files, temporary)
        publish(temporary, final)


def _save_adapter(model: Any, place: Path) -> None:
    final = behind_link(place)
    temporary = final.with_name(f".writing-{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    publish(temporary, final)


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

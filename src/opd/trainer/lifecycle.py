"""One run in its folder: begun or resumed, trained, saved and reported; and what a signal leaves of it."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.config import Config, LogConfig
from opd.config.recipe import to_dict
from opd.errors import MissingDependencyError, OpdError, RunFolderError
from opd.ranks import ALONE, Ranks
from opd.remote.secrets import settings_without_secrets
from opd.reporting.about import read_about, write_about
from opd.reporting.banner import banner, show
from opd.reporting.guarded import read_onsets, write_onsets
from opd.reporting.loading import Loading
from opd.reporting.progress import Progress
from opd.reporting.record import MetricSink, MetricsRecord, RunRecorder, read_metrics
from opd.reporting.report import write_report
from opd.reporting.sinks import open_sinks
from opd.reporting.summary import SUMMARY_FILE, write_summary
from opd.trainer.checkpoint import checkpoints, load_checkpoint, version_of
from opd.trainer.fingerprints import check_same_inputs
from opd.trainer.from_config import RunComponents
from opd.trainer.guard import Guard
from opd.trainer.interrupts import ECHO_S, RunStopped, StopRequest
from opd.trainer.launch import Launch, about_run, memory_words, versions
from opd.trainer.loop import Callback, Ended, TrainingLoop
from opd.trainer.records import summarize
from opd.trainer.resume import continued, described
from opd.trainer.resume import notes as change_notes
from opd.trainer.run_folder import RunFolder, open_run
from opd.trainer.run_state import BeforeTheRun, RunState, why_of
from opd.trainer.saving import push_student, save_student, write_cards
from opd.trainer.start_kl import start_kl_of


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run."""

    path: Path
    """Its folder: config.yaml, metrics.jsonl, samples.jsonl, checkpoints/, student/, summary.json, report.html."""
    summary: dict[str, Any] | None
    """Student before, student after, teacher; None without evaluation."""
    student: PreTrainedModel
    """The trained model, its adapters merged."""
    tokenizer: PreTrainedTokenizerBase
    ended: Ended | None = None
    """How it came to end before its last step: by a callback, or by a rule of the section guard."""
    hub: str = ""
    """Where save.push_to_hub put the student, or why it is not there; empty where nothing was asked for."""

    @property
    def metrics(self) -> list[MetricsRecord]:
        """The records of all steps and evaluations, in order."""
        return read_metrics(self.path)

    def report(self) -> Path:
        """Write report.html again, and return its path."""
        return write_report(self.path)


def run_in_folder(
    config: Config,
    build: Callable[[Config, Loading], RunComponents],
    *,
    resume: bool,
    overwrite: bool,
    callbacks: Sequence[Callback] = (),
    launch: Launch | None = None,
    ranks: Ranks = ALONE,
) -> Run:
    """Train in `config.run_dir`, which is checked before anything is built. Raises OpdError, and RunStopped after a signal. `ranks` are
    processes that train together, of which this is rank 0."""
    with (
        StopRequest(echo_s=0.0 if ranks.alone else ECHO_S) as stop,
        open_run(config, resume=resume, overwrite=overwrite) as folder,
    ):
        launch, before = launch or Launch(), BeforeTheRun(folder.path, replaces=overwrite and bool(folder.taken_by()))
        try:
            config, folder.changes = continued(config, folder.changes)
            _check_sinks(config.log)
            if not launch.announced and config.log.progress != "off":
                show(banner(to_dict(config), versions().get("opd", "")), sys.stdout)
            before.loading(config.train.steps)
            with Loading(enabled=config.log.progress) as loading:
                components = build(config, loading)
                start = _restore(folder, components) if resume else None
                ranks.gather(None if start is None else checkpoints(folder.checkpoints)[-1])
            resumed = _resumed(folder, start, config) if resume else []
            return _train(components, folder, stop, callbacks, start, resumed, launch)
        except KeyboardInterrupt:
            raise _stopped(config, folder, stop, resume=resume) from None
        finally:
            if not folder.begun:
                before.undo()


def _train(
    components: RunComponents,
    folder: RunFolder,
    stop: StopRequest,
    callbacks: Sequence[Callback],
    start: int | None,
    resumed: Sequence[str],
    launch: Launch,
) -> Run:
    config = components.config
    with stop.whole_steps():
        with folder.begin(config, step=start) as notes:
            recorder = RunRecorder(folder.path, resume_step=start, sinks=_sinks(config, folder, start))
        memory = partial(memory_words, components.student.device)
        progress = Progress(config.train.steps, start or 0, enabled=config.log.progress, memory=memory)
        state = RunState(folder.path, config.train.steps, progress.warn_once, step=start or 0)
        with _told(state, stop):
            with recorder as run, progress:
                _write_about(config, folder, launch, state, resumed=start is not None)
                warnings = [f"warning: {warning}" for warning in components.warnings if warning not in launch.said]
                for line in [*warnings, *(f"note: {note}" for note in components.notes), *notes, *resumed]:
                    progress.message(line)
                guard = _guard(components, folder, resumed=start is not None)
                loop = TrainingLoop(
                    components=components,
                    folder=folder,
                    run=run,
                    progress=progress,
                    state=state,
                    guard=guard,
                    stop=stop,
                    callbacks=callbacks,
                    start_kl=start_kl_of(components, folder.path),
                )
                ended = _run_steps(loop, components, progress)
            model = save_student(components, folder)
            summary = summarize(folder.path, config)
            if summary is not None:
                write_summary(folder.path / SUMMARY_FILE, summary)
            write_cards(folder, summary, settings_without_secrets(to_dict(config)))
            state.ended("finished" if ended is None else "stopped", "" if ended is None else ended.why)
        hub = push_student(folder.student, config.save) if config.save.push_to_hub else ""
        tokenizer = components.loaded.tokenizer
        return Run(path=folder.path, summary=summary, student=model, tokenizer=tokenizer, ended=ended, hub=hub)


def _guard(components: RunComponents, folder: RunFolder, *, resumed: bool) -> Guard:
    """The rules of this run; of a resumed one, as they stood after the step that its checkpoint is of."""
    guard = Guard(components.config)
    if resumed:
        told = read_onsets(folder.path)
        guard.replay(read_metrics(folder.path), told)
        if len(guard.onsets) < len(told):
            write_onsets(folder.path, guard.onsets)
        components.scorer.drop_also(guard.dropping)
    return guard


def _run_steps(loop: TrainingLoop, components: RunComponents, progress: Progress) -> Ended | None:
    """All steps; what ended them before the last."""
    try:
        with engine_of(components, progress.message):
            return loop.run_steps()
    finally:
        for line in [] if components.kept is None else components.kept.close():
            progress.message(line)


@contextmanager
def _told(state: RunState, stop: StopRequest) -> Iterator[None]:
    """However the block ends, state.json says it, and but for a second signal the report is there."""
    try:
        yield
    except KeyboardInterrupt:
        name = (stop.signal or signal.SIGINT).name
        if stop.second:
            state.write("stopped", f"{name}, twice")
        else:
            state.ended("stopped", name)
        raise
    except BaseException as error:
        state.ended("failed", why_of(error))
        raise


def _write_about(config: Config, folder: RunFolder, launch: Launch, state: RunState, *, resumed: bool) -> None:
    try:
        before = read_about(folder.path) if resumed else None
        write_about(folder.path, about_run(config, launch, started="" if before is None else before.started))
    except OpdError as error:
        state.warn(f"{error} The run goes on; its report cannot say what it was started with.", "about")
    state.write("running")


@contextmanager
def engine_of(components: RunComponents, say: Callable[[str], None]) -> Iterator[None]:
    """The run's inference engine, where it has one, says what it does, and is closed however the block ends."""
    engine = components.engine
    if engine is None:
        yield
        return
    engine.say = say
    try:
        yield
    finally:
        engine.close()
        components.draws.close()


def _resumed(folder: RunFolder, start: int | None, config: Config) -> list[str]:
    """Notes on the step that a run resumes from, and on its changes."""
    if start is None:
        return [f"{folder.path}: no checkpoint yet, so it starts at step 0"]
    lines = [f"{folder.path}: resuming after {start} steps"]
    if changed := described(folder.changes):
        lines.append(f"changed from here on: {changed}")
    if config.rollout.engine == "vllm":
        lines.append(
            "note: rollout.engine=vllm batches as requests come in, so from here on the run has the same prompts, versions and optimizer as "
            "without the stop, and not the same bits"
        )
    return lines + [f"warning: {note}" for note in change_notes(folder.changes, config)]


def _stopped(config: Config, folder: RunFolder, stop: StopRequest, *, resume: bool) -> RunStopped:
    """The exception for a signal: what was saved, and how the run goes on."""
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


def _restore(folder: RunFolder, components: RunComponents) -> int | None:
    """Load the newest checkpoint; the number of updates it holds, or None when there is none yet."""
    config, student = components.config, components.student
    found = checkpoints(folder.checkpoints)
    if not found:
        if folder.student.exists():
            raise RunFolderError(
                f"'{folder.path}' holds a finished student and no checkpoint, so there is nothing to resume. Use --overwrite to run it "
                "again, or another --run_dir."
            )
        return None
    state = load_checkpoint(found[-1], student)
    check_same_inputs(state["inputs"], components.fingerprints, config, folder.changes)
    version = student.version
    if version > config.train.steps:
        raise RunFolderError(
            f"train.steps={config.train.steps}, and the run in '{folder.path}' has {version} steps already. Set train.steps to {version} "
            "to end it here, or to more."
        )
    return version


def _check_sinks(log: LogConfig) -> None:
    """Before `begin` removes an old run."""
    for name, wanted in (
        ("tensorboard", log.tensorboard),
        ("wandb", log.wandb_project),
        ("trackio", log.trackio_project),
    ):
        if wanted and importlib.util.find_spec(name) is None:
            raise MissingDependencyError(
                f"The recipe logs to {name}, which is not installed: pip install 'opd[{name}]', or leave it out of the log section."
            )


def _sinks(config: Config, folder: RunFolder, start: int | None) -> list[MetricSink]:
    names = ["tensorboard"] if config.log.tensorboard else []
    found = {"wandb": config.log.wandb_project, "trackio": config.log.trackio_project}
    projects = {name: project for name, project in found.items() if project}
    return open_sinks(
        [*names, *projects],
        folder.path,
        resume_step=start,
        projects=projects,
        config=settings_without_secrets(to_dict(config)),
    )

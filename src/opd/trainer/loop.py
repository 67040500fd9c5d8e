"""The loop. Pure distillation, hybrid and pure RL differ in the objective, never here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field

from opd.config import Config
from opd.errors import DataError, OpdError, OutOfMemoryError, RankError, RunFolderError, ServerError
from opd.reporting.findings import cut_off
from opd.reporting.guarded import Onset, write_onsets
from opd.reporting.progress import Progress, TrainingPhase
from opd.reporting.record import RunRecorder, read_metrics
from opd.trainer.canary import TeacherMoved
from opd.trainer.checkpoint import checkpoints, save_checkpoint, version_of
from opd.trainer.drop import no_update
from opd.trainer.from_config import RunComponents
from opd.trainer.guard import Guard
from opd.trainer.guard_readings import Reading
from opd.trainer.guardrails import TORCH_ERRORS, explain, memory_advice
from opd.trainer.interrupts import Interrupted, Stop, StopRequest
from opd.trainer.records import nothing_to_gain, record_evaluation, record_samples, recorded
from opd.trainer.run_folder import RunFolder
from opd.trainer.run_state import RunState
from opd.trainer.scoring import Scored
from opd.trainer.show_sample import show_sample
from opd.trainer.start_kl import StartKl
from opd.trainer.together import Evaluate, TakeStep
from opd.types import LossOutput, Rollout

Callback = Callable[[dict[str, float]], object]
"""Called with the record of every step: its number, from 0, as `step`, and its metrics. May raise Stop."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step as it went."""

    rollouts: Sequence[Rollout]
    scored: Scored
    out: LossOutput
    metrics: dict[str, float]
    canary: Reading | None = None
    """What was seen of the teachers; None where nobody looked."""


def take_step(
    components: RunComponents,
    step: int,
    announce: Callable[[TrainingPhase], object] = lambda _phase: None,
    before_update: Callable[[], AbstractContextManager[None]] = nullcontext,
    start_kl: StartKl | None = None,
) -> Step:
    """Rollouts, their targets, one update; the sampler has the weights from before still. `announce` is told each phase as it begins;
    `before_update` is entered around everything that moves no weight, and `start_kl` asked before one does. Raises TeacherMovedError in the place of an update."""
    clock = Clock(announce)
    with components.ranks.noticing():
        return _take_step(components, step, clock, before_update, start_kl)


def _take_step(
    components: RunComponents,
    step: int,
    clock: Clock,
    before_update: Callable[[], AbstractContextManager[None]],
    start_kl: StartKl | None,
) -> Step:
    student, draws = components.student, components.draws
    with before_update():
        with clock.phase("rollout"):
            rollouts = draws.take(step)
            staleness = draws.staleness(rollouts, student.version)
        with clock.phase("teacher"):
            scored, canary = components.canary.scored(lambda: components.scorer.score(rollouts, step), step)
        moved = None if start_kl is None else start_kl.measure(student, rollouts)
    correction = components.correction
    with clock.phase("update"):
        scored = scored if correction is None else correction.corrected(student, scored)
        watched = recorded(rollouts, step, components.config.log)
        out = student.update(scored.batches, scored.objective, watched) if scored.trained_on else no_update(student)
    if correction is not None:
        correction.check({**out.metrics, **scored.metrics})
    seen = {} if canary is None else {"canary": canary.value}
    seen |= {} if moved is None else {"start_kl": moved}
    metrics = {**out.metrics, **scored.metrics, **staleness, **seen, **clock.times(out)}
    return Step(rollouts=rollouts, scored=scored, out=out, metrics=metrics, canary=canary)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run came to end before its last step."""

    why: str
    rule: str | None = None
    """The rule of the section guard that ended it; None for a callback."""


def stopped_by(broken: Sequence[Onset], step: int, steps: int) -> Ended | None:
    """The end that a rule with action=stop makes; none where the last step has been taken."""
    onset = next((one for one in broken if one.action == "stop"), None)
    if onset is None or step + 1 >= steps:
        return None
    return Ended(why=f"stopped by guard.{onset.rule}: {onset.facts}", rule=onset.rule)


@dataclass(frozen=True, kw_only=True)
class TrainingLoop:
    """The steps of a run, and what is due after each: records, evaluations, checkpoints."""

    components: RunComponents
    folder: RunFolder
    run: RunRecorder
    progress: Progress
    state: RunState
    guard: Guard
    stop: StopRequest = field(default_factory=StopRequest)
    callbacks: Sequence[Callback] = ()
    start_kl: StartKl | None = None
    """Measures how far the student has moved; None where guard.start_kl is off."""

    @property
    def config(self) -> Config:
        return self.components.config

    def run_steps(self) -> Ended | None:
        """From the student's version to the last step, or to a callback's Stop or a rule's, which is returned. Raises Interrupted between
        two steps after a signal; what was trained is in a checkpoint then."""
        student, config = self.components.student, self.config
        draws = self.components.draws
        with self.stop.at_once() if self.components.engine else nullcontext():  # an engine may take minutes to start
            draws.load(student)
        self.state.running(student.version)
        self.evaluate_if_missing()
        for step in range(student.version, config.train.steps):
            try:
                self.components.ranks.gather(TakeStep(step=step, dropping=frozenset(self.guard.dropping)))
                done = take_step(self.components, step, self.progress.phase, self.saved_on_error, self.start_kl)
            except RankError:  # ranks ask each other nothing once weights move
                self._save_reached()
                raise
            except TeacherMoved as moved:
                return self._without_update(step, moved.reading)
            with self.saved_on_error():
                broken = self._record(step, done)
                draws.load(student)  # the next rollouts are on-policy again
                why = self._call_back({"step": step, **done.metrics})
                ended = Ended(why=why) if why is not None else stopped_by(broken, step, config.train.steps)
                if evaluation_due(config, student.version) or ended is not None:
                    self.evaluate(first=False, last=ended is not None)
                if due(student.version, config.checkpoint.every) or ended is not None:
                    self.save()
                self.stop.check()
            if ended is not None:
                return ended
        return None

    def _record(self, step: int, done: Step) -> list[Onset]:
        """Write the step down and say what there is to say; the rules that begin to be broken."""
        rollout, out, scored = self.config.rollout, done.out, done.scored
        self.run.step(step, done.metrics)
        parts = self.components
        record_samples(
            self.run, step, done.rollouts, out, scored.rewards, parts.renderer, self.config.log, parts.teacher
        )
        for note in scored.notes:
            self.progress.message(f"warning: step {step + 1}: {note}")
        if rollout.horizon(step, self.config.train.steps) == rollout.max_new_tokens:
            self.progress.warn_once(cut_off(done.metrics["truncated"], rollout.max_new_tokens), "cut off")
        self.progress.update(step, done.metrics)
        every = self.config.log.show_samples
        if every and step % every == 0:
            show_sample(self.progress, step, done.rollouts, out, scored.rewards, self.components.renderer)
        broken = self.guard.look(step, done.metrics, done.canary)
        for onset in broken:
            self.progress.message(f"warning: step {step + 1}: {onset.text}")
        if broken:
            write_onsets(self.folder.path, self.guard.onsets)
        parts.scorer.drop_also(self.guard.dropping)
        self.state.running(step + 1)
        return broken

    def _without_update(self, step: int, canary: Reading) -> Ended:
        """The end that a teacher makes which is no longer what it was: nothing is evaluated against it."""
        onset = self.guard.before_update(step, canary)
        self.progress.message(f"warning: before step {step + 1}: {onset.text}")
        write_onsets(self.folder.path, self.guard.onsets)
        done = checkpoints(self.folder.checkpoints)
        if not done or version_of(done[-1]) < self.components.student.version:
            self.save()
        return Ended(why=f"stopped by guard.{onset.rule}: {onset.facts}", rule=onset.rule)

    def _call_back(self, record: dict[str, float]) -> str | None:
        """Call every callback; the reason when one ends the run. Raises DataError for one that fails."""
        ended = None
        for callback in self.callbacks:
            name = getattr(callback, "__name__", type(callback).__name__)
            try:
                callback(dict(record))
            except Stop as stop:
                ended = f"stopped by the callback {name} after step {record['step']}: {stop or 'no reason given'}"
                self.progress.message(ended)
            except OpdError:
                raise
            except Exception as error:  # somebody else's function
                raise DataError(
                    f"The callback {name} failed after step {record['step']}: {type(error).__name__}: {error}. Mend the function; a run "
                    "resumes where it stopped. To end a run from a callback, raise opd.Stop."
                ) from error
        return ended

    @contextmanager
    def saved_on_error(self) -> Iterator[None]:
        """Saves what was trained before a signal, a failing reward or server, a lost rank, exhausted memory, or an output that nobody reads
        ends the run where no weight moves, so that it resumes where it stopped. An evaluation that is left out then is made by the run
        that is resumed."""
        try:
            yield
        except (Interrupted, DataError, OutOfMemoryError, RankError, ServerError):
            self._save_reached()
            raise
        except (
            OSError
        ):  # of a pipe whose reader has gone, or of a full disk, on which a checkpoint may have no place either
            with suppress(OSError, RunFolderError):
                self._save_reached()
            raise

    def _save_reached(self) -> None:
        """Write a checkpoint, unless the newest one has these updates."""
        if not self.components.ranks.complete:  # a part of the weights is gone
            return
        done = checkpoints(self.folder.checkpoints)
        if self.components.student.version > (version_of(done[-1]) if done else 0):
            self.save()

    def save(self) -> None:
        """Write a checkpoint."""
        state = {"inputs": self.components.fingerprints}
        save_checkpoint(self.folder.checkpoints, self.components.student, state, keep=self.config.checkpoint.keep)

    def evaluate_if_missing(self) -> None:
        """The evaluation before the first step, or the one that a stopped run left out; and a first one where a resumed run measures
        something else than before."""
        parts = self.components
        if parts.evaluator is None:
            return
        version = parts.student.version
        records = read_metrics(self.run.run_dir) if version > 0 else []
        done = [r for r in records if r.kind == "eval" and r.measure in (None, parts.evaluator.measure)]
        expected = {"student"} if parts.teacher is None or parts.teacher_sampler is None else {"student", "teacher"}
        if not expected <= {r.who for r in done}:
            self.evaluate(first=True)
        elif evaluation_due(self.config, version) and not any(r.who == "student" and r.step == version for r in done):
            self.evaluate(first=False)

    @contextmanager
    def _cut_short(self) -> Iterator[None]:
        self.stop.check()
        with self.stop.at_once() if self.components.ranks.alone else nullcontext():
            yield

    def evaluate(self, *, first: bool, last: bool = False) -> None:
        """Held-out evaluation of the student, and of the teacher before the first step. A signal cuts it short, but for several ranks, which
        answer each other: no weight moves."""
        parts, progress, config = self.components, self.progress, self.config
        if parts.evaluator is None:
            return
        version = parts.student.version
        with memory_advice("eval"):
            progress.phase("eval")
            with self._cut_short():
                extra = first or last or version == config.train.steps
                parts.ranks.gather(Evaluate(who="student", extra=extra))
                student = parts.evaluate("student", extra=extra)
            measured = (parts.renderer, config.log, parts.evaluator.measure, parts.teacher)
            record_evaluation(self.run, version, "student", student, *measured)
            teacher = None
            if first and parts.teacher is not None and parts.teacher_sampler is not None:
                with self._cut_short():
                    parts.ranks.gather(Evaluate(who="teacher", extra=True))
                    teacher = parts.evaluate("teacher", extra=True)
                record_evaluation(self.run, version, "teacher", teacher, *measured)
                self.guard.compare_with(teacher.metrics)
        self.state.running(version, evaluated=True)
        reached = student.metrics
        apart = f", reverse KL {reached['reverse_kl']:.4f}" if "reverse_kl" in reached else ""
        cut = f", {reached['truncated']:.1%} cut off" if reached["truncated"] else ""
        progress.message(f"step {version}: held-out accuracy {reached['accuracy']:.3f}{apart}{cut}")
        progress.warn_once(cut_off(reached["truncated"], config.rollout.max_new_tokens), "cut off")
        if teacher is not None and version == 0:
            shown_more = config.prompts.teacher_prompt is not None
            note = nothing_to_gain(reached, student.intervals, teacher.metrics, shown_more=shown_more)
            progress.warn_once(note, "nothing to gain")


def evaluation_due(config: Config, version: int) -> bool:
    """True where the student is evaluated when it has had `version` updates."""
    return config.eval.every > 0 and (version % config.eval.every == 0 or version == config.train.steps)


def due(completed: int, every: int) -> bool:
    """True where something that happens every n steps happens after `completed` of them."""
    return every > 0 and completed % every == 0


class Clock:
    """Wall-clock seconds of each phase of a step; names the phase in out-of-memory errors."""

    def __init__(self, announce: Callable[[TrainingPhase], object]) -> None:
        self.began = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.announce = announce

    @contextmanager
    def phase(self, name: TrainingPhase) -> Iterator[None]:
        began = time.perf_counter()
        self.announce(name)
        try:
            yield
        except TORCH_ERRORS as error:
            explain(error, name)
            raise
        self.seconds[f"time/{name}"] = time.perf_counter() - began

    def times(self, out: LossOutput) -> dict[str, float]:
        total = time.perf_counter() - self.began
        return {**self.seconds, "time/step": total, "time/tokens_per_second": out.metrics["tokens"] / total}

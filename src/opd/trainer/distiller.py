"""`Distiller`: the way in from Python. Everything that a recipe names, it takes as a name or as an object."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.config import Config
from opd.config.recipe import build
from opd.errors import ConfigError, RunFolderError
from opd.models import is_adapted
from opd.quantized import merged
from opd.ranks import ALONE, Ranks
from opd.reporting.loading import Loading
from opd.trainer.from_config import Given, RunComponents
from opd.trainer.from_objects import config_and_given
from opd.trainer.guardrails import memory_advice
from opd.trainer.keep_rollouts import keep_rollouts
from opd.trainer.launch import Launch
from opd.trainer.lifecycle import Run, run_in_folder
from opd.trainer.loop import Callback, take_step
from opd.trainer.saving import write_student

if TYPE_CHECKING:
    import os

    from opd.config import (
        CheckpointConfig,
        EvalConfig,
        GuardConfig,
        LogConfig,
        MixtureConfig,
        OptimizerConfig,
        PromptsConfig,
        RewardConfig,
        RlConfig,
        RolloutConfig,
        SaveConfig,
        StudentConfig,
        TeacherConfig,
        TrainConfig,
    )
    from opd.losses import Objective
    from opd.samplers.base import Sampler
    from opd.teachers.base import Teacher
    from opd.types import Reward

    Model = str | os.PathLike[str] | PreTrainedModel | tuple[PreTrainedModel, PreTrainedTokenizerBase]
    Section = Mapping[str, Any]


class Distiller:
    """Distils a teacher into a student on the student's own samples.

    >>> distiller = opd.Distiller(student="Qwen/Qwen3-0.6B", teacher=(model, tokenizer), prompts=rows, reward=is_right)
    >>> run = distiller.train()

    Sections are those of a recipe, as objects, or as dicts of what differs from the default. Wrong arguments raise an OpdError at
    once; models are loaded by the first `train`, `step`, `evaluate` or `save`.
    """

    def __init__(
        self,
        *,
        student: Model | StudentConfig | Section,
        teacher: Model | TeacherConfig | Section | Teacher | None = None,
        teachers: Mapping[str, Model | TeacherConfig | Section | Teacher] | None = None,
        mixture: MixtureConfig | Section | str | None = None,
        prompts: str | os.PathLike[str] | PromptsConfig | Section | Sequence[Any] | Any,
        eval_prompts: str | os.PathLike[str] | Sequence[Any] | Any = None,
        objective: Objective | Section | str | None = None,
        reward: str | Reward | RewardConfig | Section | None = None,
        rl: RlConfig | Section | None = None,
        rollout: RolloutConfig | Section | None = None,
        sampler: Sampler | None = None,
        optimizer: OptimizerConfig | Section | str | None = None,
        train: TrainConfig | Section | None = None,
        guard: GuardConfig | Section | None = None,
        eval: EvalConfig | Section | None = None,
        checkpoint: CheckpointConfig | Section | None = None,
        log: LogConfig | Section | None = None,
        save: SaveConfig | Section | None = None,
        callbacks: Callback | Sequence[Callback] = (),
        run_dir: str | os.PathLike[str] | None = None,
        seed: int | None = None,
    ) -> None:
        """`student`, `teacher`: a folder or hub name, (model, tokenizer), or a section whose `model` is one of these; a teacher also any
        object with the members of `opd.Teacher`. The model that is given is the one that is trained.

        `prompts`, `eval_prompts`: a file, a `datasets.Dataset`, a list of dicts (columns as in a file) or of texts; `prompts` also the
        section, whose `path` may be any of these.

        `reward`: a name as in eval.reward, or a function of (prompt, response); the section, for its time limit. Functions may also
        stand in dicts: eval={"reward": f}, rl={"reward": g}.
        `sampler`: an object with the methods of `opd.Sampler`, in place of sampling in this process. Evaluations sample in this process.
        `callbacks`: called with the record of every step, a dict of its metrics and its number, `step`. `raise opd.Stop("why")` in one
        ends the run after that step: student saved, report written.
        """
        config, given = config_and_given(
            student=student,
            teacher=teacher,
            teachers=teachers,
            mixture=mixture,
            prompts=prompts,
            eval_prompts=eval_prompts,
            objective=objective,
            reward=reward,
            rl=rl,
            rollout=rollout,
            sampler=sampler,
            optimizer=optimizer,
            train=train,
            guard=guard,
            eval=eval,
            checkpoint=checkpoint,
            log=log,
            save=save,
            run_dir=run_dir,
            seed=seed,
        )
        self._set_up(config, given, callbacks)

    @classmethod
    def from_config(
        cls,
        config: Config | Mapping[str, Any],
        *,
        callbacks: Callback | Sequence[Callback] = (),
        launch: Launch | None = None,
        ranks: Ranks = ALONE,
    ) -> Distiller:
        """A Distiller of a recipe: a Config, or the dict that would make one. `launch` is what about.json will say of how it started;
        `ranks` are processes that train together, of which this is rank 0."""
        if isinstance(config, Mapping):
            config = build(config)
        if not isinstance(config, Config):
            raise ConfigError(
                f"A Distiller is made from an opd.Config or a dict of its sections, not {config!r}; a recipe file is "
                "opd.config.recipe.load(PATH)."
            )
        distiller = cls.__new__(cls)
        launch = launch or Launch()
        distiller._set_up(config, Given(ranks=ranks, read=launch.read), callbacks)
        distiller._launch = launch
        return distiller

    def _set_up(self, config: Config, given: Given, callbacks: Callback | Sequence[Callback]) -> None:
        self.config = config
        self.callbacks = tuple(callbacks) if isinstance(callbacks, Sequence) else (callbacks,)
        for callback in self.callbacks:
            if not callable(callback):
                raise ConfigError(
                    f"callbacks holds {callback!r}, which cannot be called; give functions of a step's record."
                )
        self._given = given
        self._launch = Launch()
        self._components: RunComponents | None = None
        self._trained: PreTrainedModel | None = None

    @property
    def components(self) -> RunComponents:
        """Student, sampler, scorer and the rest, which are loaded on first use."""
        return self._build(self.config)

    def _build(self, config: Config, loading: Loading | None = None) -> RunComponents:
        if self._components is None:
            self._given.ranks.gather(config)
            self._components = RunComponents(config, self._given, loading)
        return self._components

    def train(self, *, resume: bool = False, overwrite: bool = False) -> Run:
        """Run all steps that are left, and return what came of them. `resume` goes on from the last checkpoint in `run_dir`, and
        `overwrite` replaces the run there.

        Raises OpdError; the run folder then holds everything up to the last completed step. After SIGINT, SIGTERM or SIGHUP it finishes
        the step, saves a checkpoint and raises RunStopped, a KeyboardInterrupt; a second signal ends it at once. A handler of the
        caller's own is left alone, and outside the main thread no signal arrives.
        """
        self._refuse_after_training("train again")
        if resume and self._components is not None:
            raise ConfigError(
                "resume=True loads weights over those that are in use already; make a new Distiller for it."
            )
        run = run_in_folder(
            self.config,
            self._build,
            resume=resume,
            overwrite=overwrite,
            callbacks=self.callbacks,
            launch=self._launch,
            ranks=self._given.ranks,
        )
        self._trained = run.student
        return run

    def draw_rollouts(self, *, overwrite: bool = False) -> dict[str, float]:
        """Draw the rollouts of the student before training, score them, and write both to rollout.path, as opd rollouts does; return
        means over them, with the initial `overlap` of student and teacher. Raises ConfigError unless rollout.source is "cached"."""
        if self.config.rollout.source != "cached":
            raise ConfigError('There is no folder for them; give rollout={"source": "cached", "path": DIR}.')
        given = self._given
        if given.student is not None and self.config.student.lora is not None:  # the adapters of the run come later
            given = replace(given, student=copy.deepcopy(given.student))
        return dict(keep_rollouts(self.config, given, overwrite=overwrite, say=lambda _line: None).summary)

    def step(self) -> dict[str, float]:
        """Take one step, and return its record: metrics, and its number as `step`. Nothing is written, and no callback is called."""
        self._refuse_after_training("take a step")
        step, steps = self.components.student.version, self.config.train.steps
        if step == 0:
            self.components.draws.load(self.components.student)
        if step >= steps:
            raise ConfigError(
                f"All {steps} steps are done, where the schedules end; make a Distiller with more train.steps."
            )
        done = take_step(self.components, step)
        self.components.draws.load(self.components.student)  # the next rollouts are on-policy again
        return {"step": step, **done.metrics}

    def evaluate(self) -> dict[str, float]:
        """Metrics of the student as it is now on the held-out prompts. Raises ConfigError without any."""
        parts = self.components
        if parts.evaluator is None:
            raise ConfigError("There is nothing to evaluate on; give eval_prompts=…, and eval.every above 0.")
        parts.student_sampler.load(parts.student)
        with memory_advice("eval"):
            return parts.evaluate("student", extra=False).metrics

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save the student as it is now as a Hugging Face folder, its adapters merged. Raises RunFolderError for a folder that holds
        something."""
        place = Path(path)
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise RunFolderError(f"'{place}' is there already; give save() a folder that is new or empty.")
        model: Any = self.components.student.model if self._trained is None else self._trained
        if is_adapted(model):
            model = merged(copy.deepcopy(model))  # the student itself goes on with its adapters
        write_student(model, self.components.loaded.files, place, "save again", self.components.saved_dtype)
        return place

    def _refuse_after_training(self, what: str) -> None:
        if self._trained is not None:
            raise ConfigError(
                f"train() has ended this run, so it cannot {what}; make a new Distiller, e.g. of student='{self.config.run_dir}/student'."
            )

"""Config → the components of a run, checked against each other before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from opd.config import Config, RewardConfig
from opd.data.chat import left_out_notices
from opd.data.prompts import PromptSchedule
from opd.doctor.checks import check_lengths, check_packing, check_rows, check_tokens, notices, saved_notes, served_notes
from opd.doctor.read_prompts import ReadPrompts, read_prompts
from opd.doctor.reading import check_reading, check_text
from opd.doctor.same_weights import SampledWeights, check_agreement, sampled_weights
from opd.errors import ConfigError
from opd.models import resolve_device, saved_dtype
from opd.quantized import check_trainable
from opd.ranks import ALONE, Ranks
from opd.reporting.loading import Loading
from opd.reporting.record import Who
from opd.rewards import Reward, Scorer, load_reward
from opd.samplers.base import AdjustableSampler, Sampler, Sampling
from opd.samplers.kept import KeptRollouts
from opd.samplers.off_policy import DatasetResponses, OnOffPolicySampler
from opd.samplers.vllm import Engine
from opd.seeding import derive_seed
from opd.teachers.base import Teacher
from opd.teachers.cache import KeptScores
from opd.trainer.canary import Canary
from opd.trainer.draws import Draws
from opd.trainer.evaluate import Evaluation, Evaluator, measure_of
from opd.trainer.fingerprints import HELD_OUT, prompts_fingerprint, tokenizer_fingerprint, weights_fingerprint
from opd.trainer.importance import EngineCorrection, correction_note, engine_correction
from opd.trainer.load_models import GivenModel, LoadedModel, load_model, make_sampler
from opd.trainer.lora import add_lora
from opd.trainer.policy import Policy, no_teacher
from opd.trainer.reference import frozen_copy, reference_teacher
from opd.trainer.reinforce import Reinforcement
from opd.trainer.rollout_engine import make_vllm_sampler
from opd.trainer.scoring import StepScorer
from opd.trainer.served import check_context, served_fingerprints
from opd.trainer.settle import settle_parallel, with_microbatch
from opd.trainer.student import Student
from opd.trainer.teacher_set import TeacherSet, build_teachers
from opd.trainer.together import FirstRankScorer, check_same, nested

if TYPE_CHECKING:
    from opd.trainer.division import Divisions


@dataclass(frozen=True, kw_only=True)
class Given:
    """Python objects in the place of what the config names; the config holds a description of each."""

    student: GivenModel | None = None
    teachers: Mapping[str, GivenModel | Teacher] = field(default_factory=dict)
    prompts: Iterable[Any] | None = None
    eval_prompts: Iterable[Any] | None = None
    rewards: Mapping[str, Reward] = field(default_factory=dict)
    """Functions by their description."""
    sampler: Sampler | None = None
    read: ReadPrompts | None = None
    """The prompts of the recipe, where they were read already."""
    draws_kept: bool = False
    """Rollouts are drawn that rollout.source=cached will take."""
    ranks: Ranks = ALONE
    """The processes that train together."""

    def reward(self, name: str, config: RewardConfig) -> Scorer:
        """The reward of this name or description, called as the recipe says. Raises ConfigError."""
        return FirstRankScorer(
            reward=self.rewards.get(name) or load_reward(name),
            timeout=config.timeout,
            on_error=config.on_error,
            ranks=self.ranks,
        )


class RunComponents:
    """Everything a run needs: loaded in the order in which it can be refused, checked against each other, and connected."""

    config: Config
    ranks: Ranks
    """The processes that train together; they have the same components."""
    student: Student
    sampler: Sampler
    """Draws the rollouts of training."""
    student_sampler: AdjustableSampler
    """Draws the student's responses in evaluations, with the engine of the rollouts."""
    engine: Engine | None = None
    """The inference engine, which has to be closed; None for sampling by transformers."""
    correction: EngineCorrection | None
    """What the update does about an engine's samples; None without an engine."""
    scorer: StepScorer
    teacher: Teacher | None
    """None where the student learns from a reward alone."""
    canary: Canary
    """Sees a teacher that is no longer what it was."""
    teacher_sampler: AdjustableSampler | None
    """The teacher on its own rendering of the prompts, for evaluations."""
    teacher_policy: Policy | None
    """The teacher's weights, to be evaluated as the student is; None for several."""
    schedule: PromptSchedule
    draws: Draws
    """The rollouts of every step: `sampler` on the prompts of `schedule`."""
    evaluator: Evaluator | None
    loaded: LoadedModel
    """The student as it was loaded, with its tokenizer and their files."""
    fingerprints: dict[str, str]
    """Of the prompts, of the student's first weights and tokenizer, and of the teachers'."""
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    """Facts that need no action."""
    kept: KeptScores | None
    """What the teachers' caches did; None without one."""
    divisions: Divisions | None
    """The models whose weights are divided over the ranks; None where every rank has whole ones."""

    def __init__(self, config: Config, given: Given | None = None, loading: Loading | None = None) -> None:
        """Raises the OpdError of whatever does not fit; nothing has been trained by then. `loading` is told what is loaded."""
        self.config = config
        self._given = given = given or Given()
        self.ranks = given.ranks
        said = self._take_prompts()
        everything = [*self._prompts, *self._held_out]
        check_rows(config, self._prompts, self._held_out)
        self._measured = given.reward(config.eval.reward, config.reward)
        divides, parallel = settle_parallel(config, everything, self.ranks)
        home = "cpu" if divides else None  # no device has room for a whole model
        options: dict[str, Any] = {"device": config.student.device, "given": given.student, "loading": loading}
        first = next(iter(self._prompts), None)
        self.loaded = load_model(config.student, "student", config.prompts, shown=first, home=home, **options)
        place = resolve_device(config.student.device) if given.student is None else self.loaded.model.device
        self.config = config = with_microbatch(config, self.loaded.model, gpu=place.type != "cpu")
        self.renderer, self.pad_id = self.loaded.renderer, self.loaded.pad_id
        # Before vocabularies are compared: where a tokenizer lost its own, that is the reason to give.
        said += check_text(self.renderer, "student", everything)
        first_weights = sampled_weights(self.loaded.model)
        self._model = self._trainable()
        self._teachers = teachers = build_teachers(config, self.loaded, self._model, given.teachers, loading, home)
        teachers.check_prompts(everything)
        check_tokens(config.objective, config.rollout, self.renderer, teachers.vocabulary)
        for role, one in {"student": self.loaded, **teachers.loaded}.items():
            check_lengths(everything, one.renderer, one.model, config.rollout.max_new_tokens)
            if config.train.layout == "packed":
                check_packing(one.model, role, self.pad_id)
        for one in teachers.served.values():
            check_context(one, everything, config.rollout.max_new_tokens)
        readers = {**teachers.loaded, **teachers.served}
        said += check_reading(config, everything, self.loaded, readers)
        said += check_agreement(config, everything, self.loaded, readers, first_weights)
        said += left_out_notices(one.renderer.chat for one in (self.loaded, *readers.values()))
        self.fingerprints = self._fingerprints(first_weights)
        check_same(self.ranks, self.fingerprints, "Ranks that train together have loaded other inputs")
        self._reference = frozen_copy(config, self._model)
        self.divisions = self._divided(place) if divides else None
        self._connect()
        self.warnings = tuple(dict.fromkeys([*said, *teachers.said, *teachers.vocabulary.warnings, *notices(config)]))
        saved = [] if given.student else saved_notes(config.student, self.loaded.model, config.save.dtype)
        divided = () if self.divisions is None else self.divisions.notes
        self.notes = (*self._noted, *served_notes(config), *saved, *correction_note(config), *parallel, *divided)

    @property
    def saved_dtype(self) -> torch.dtype | None:
        """Dtype of the weights in student/; None is that of the model in memory."""
        return saved_dtype(self.config.save.dtype, self.loaded.stored_dtype)

    def evaluate(self, who: Who, *, extra: bool) -> Evaluation:
        """An evaluation of the student, or of the teacher's own answers, at more temperatures with `extra`. There are held-out prompts, and
        for the teacher's a `teacher_sampler`."""
        assert self.evaluator is not None
        if who == "student":
            with self.ranks.noticing():
                return self.evaluator.run(self.student_sampler, self.student, extra=extra)
        assert self.teacher is not None and self.teacher_sampler is not None
        with self.ranks.noticing(), self.teacher.context():
            return self.evaluator.run(self.teacher_sampler, self.teacher_policy, extra=extra)

    def _connect(self) -> None:
        config, teachers = self.config, self._teachers
        self.teacher, self.kept = teachers.teacher, teachers.kept
        self.student = self._student()
        self.student_sampler = self._student_sampler()
        self.correction = engine_correction(config)
        self.scorer = StepScorer(
            objective=config.objective,
            rl=config.rl,
            train=replace(config.train, drop=()) if self._given.draws_kept else config.train,  # all are kept
            teacher=teachers.teacher,
            kind=teachers.kind,
            ensemble=teachers.ensemble,
            kept=teachers.kept,
            reinforcement=self._reinforcement() if config.rl.rewarded else None,
            rewards=self._training_reward() if config.judges_besides else None,
            pad_id=self.pad_id,
            device=self.student.device,
            ranks=self.ranks,
            cross_entropy=config.rollout.cross_entropy,
        )
        self.canary = Canary(config, teachers.members, self._prompts, self.ranks)
        self.sampler = self._sampler(self._kept_rollouts() or self._given.sampler or self.student_sampler)
        self.teacher_sampler = teachers.sampler(config.rollout, self.pad_id, ranks=self.ranks, around=self._gathered)
        self.teacher_policy = teachers.policy()
        order = derive_seed(config.seed, 0, "prompts")
        self.schedule = PromptSchedule(self._prompts, seed=order, shuffle=config.prompts.shuffle)
        self.draws = Draws(config, self.schedule, self.sampler)
        self.evaluator = self._evaluator() if self._held_out else None

    def _student_sampler(self) -> AdjustableSampler:
        config, vocabulary = self.config, self._teachers.vocabulary
        if config.rollout.engine == "vllm":
            if self._given.sampler is not None:
                raise ConfigError(
                    "sampler=… takes the place of rollout.engine, so rollout.engine=vllm would never sample; drop one of the two."
                )
            prompts = [*self._prompts, *self._held_out]
            sampler = make_vllm_sampler(config, self.loaded, self.student, vocabulary, prompts)
            self.engine = sampler.engine
            return sampler
        return make_sampler(
            config.rollout,
            self.loaded,
            vocabulary,
            self.pad_id,
            source="student",
            model=self._model,
            autocast=self.student.autocast,
            record_entropy=config.train.token_fraction < 1,
            model_context=self._around(self._model),
            ranks=self.ranks,
        )

    def _student(self) -> Student:
        config, rollout, teacher = self.config, self.config.rollout, self._teachers.teacher
        return Student(
            self._model,
            config.optimizer,
            vocabulary=self._teachers.vocabulary,
            eos_ids=self.loaded.eos,
            total_steps=config.train.steps,
            autocast=config.train.autocast == "bfloat16",
            loss_memory=config.train.loss_memory,
            gradient_checkpointing=config.student.gradient_checkpointing,
            plain_sampling=rollout.temperature == 1
            and rollout.top_p == 1
            and rollout.top_k == 0
            and rollout.source == "live",
            teacher_logits=no_teacher if teacher is None else teacher.logits,
            ema=self._teachers.ema,
            ranks=self.ranks,
            divisions=self.divisions,
        )

    def _sampler(self, on_policy: Sampler) -> Sampler:
        """The student's sampler, or with rollout.lmbda < 1 a mix with another source."""
        loaded, rollout = self.loaded, self.config.rollout
        if rollout.lmbda == 1:
            return on_policy
        off_policy: Sampler | None = DatasetResponses(loaded.renderer, rollout.max_new_tokens, eos_ids=loaded.eos)
        if rollout.off_policy == "teacher":
            off_policy = self._teachers.sampler(
                rollout, loaded.pad_id, student=loaded, ranks=self.ranks, around=self._gathered
            )
        if off_policy is None:
            raise ConfigError(
                "rollout.off_policy=teacher draws samples from the teacher, and a teacher object of your own is no model that could draw "
                "them. Use rollout.off_policy=dataset, or rollout.lmbda=1."
            )
        return OnOffPolicySampler(on_policy, off_policy, rollout.lmbda)

    @property
    def teachers(self) -> TeacherSet:
        """The teachers one by one."""
        return self._teachers

    @property
    def drawn_from(self) -> dict[str, Any]:
        """Everything that the student's rollouts before training depend on, by name."""
        config, rollout = self.config, self.config.rollout
        inputs = ("training prompts", "student's starting weights", "student's tokenizer and chat template")
        settings = ("max_new_tokens", "temperature", "top_p", "top_k", "stop")
        return {
            **{name: self.fingerprints[name] for name in inputs},
            **{f"rollout.{name}": getattr(rollout, name) for name in settings},
            "prompts.system": config.prompts.system,
            "student.chat_template_kwargs": dict(config.student.chat_template_kwargs),
        }

    def _kept_rollouts(self) -> Sampler | None:
        """What opd rollouts has drawn, where the recipe takes it."""
        rollout = self.config.rollout
        if rollout.source == "live" or self._given.draws_kept:
            return None
        if self._given.sampler is not None:
            raise ConfigError(
                "rollout.source=cached takes rollouts from a file, and a sampler object would draw others; drop one of them."
            )
        kept = KeptRollouts(rollout.path or "", self._prompts, self.drawn_from, self.config.train.samples_per_prompt)
        self.fingerprints["kept rollouts"] = kept.digest
        return kept

    def _fingerprints(self, first_weights: SampledWeights) -> dict[str, str]:
        found = {"training prompts": prompts_fingerprint(self._prompts)}
        if self._held_out:
            found[HELD_OUT] = prompts_fingerprint(self._held_out)
        found["student's starting weights"] = weights_fingerprint(first_weights)
        found["student's tokenizer and chat template"] = tokenizer_fingerprint(self.loaded.tokenizer, self.loaded.eos)
        for name, teacher in self._teachers.loaded.items():
            if self.config.all_teachers[name].source == "model":
                whose = "teacher" if name == "teacher" else f"teacher {name}"
                found[f"{whose}'s own weights"] = weights_fingerprint(sampled_weights(teacher.model))
                found[f"{whose}'s tokenizer and chat template"] = tokenizer_fingerprint(teacher.tokenizer, teacher.eos)
        for name, teacher in self._teachers.served.items():
            found |= served_fingerprints(teacher, "teacher" if name == "teacher" else f"teacher {name}")
        return found

    def _reinforcement(self) -> Reinforcement:
        vocabulary = self._teachers.vocabulary
        reference = reference_teacher(self.config, self._model, self._reference, self.renderer, vocabulary, self.pad_id)
        return Reinforcement(self.config.rl, self._training_reward(), reference=reference, ranks=self.ranks)

    def _divided(self, device: torch.device) -> Divisions:
        """Divide the student and all teachers in this process over the ranks."""
        from opd.trainer.division import Divisions

        ema = self._teachers.ema
        others = [
            *(one.model for one in self._teachers.loaded.values()),
            self._reference,
            None if ema is None else ema.model,
        ]
        return Divisions(self.ranks, device, self._model, [model for model in others if model is not None])

    def whole_student(self) -> PreTrainedModel:
        """The student with all of its weights; divided ones are gathered in main memory, on rank 0, which alone asks."""
        return self.student.model if self.divisions is None else self.divisions.whole_student()

    def _around(self, model: PreTrainedModel) -> Callable[[], AbstractContextManager[None]]:
        """What is entered around sampling from a model."""
        return nullcontext if self.divisions is None else self.divisions.around(model)  # pyright: ignore[reportReturnType]

    def _gathered(self, name: str) -> Callable[[], AbstractContextManager[None]]:
        return nested(self._teachers.members[name].context, self._around(self._teachers.loaded[name].model))

    def _training_reward(self) -> Scorer:
        config = self.config
        return self._given.reward(config.rl.reward or config.eval.reward, config.reward)

    def _take_prompts(self) -> list[str]:
        """The rows to train on, and those to evaluate on; returns what rows hold and prompts do not."""
        config, given = self.config, self._given
        read = given.read or read_prompts(config, given.prompts, given.eval_prompts)
        self._prompts, self._held_out, self._noted = read.training, read.held_out, read.noted
        rows, wanted = len(read.training), config.train.prompts_per_step
        several = [
            f"train.prompts_per_step={wanted} is more than {config.prompts.path} has rows ({rows}), so a step holds some prompts several "
            "times."
        ]
        return [*read.said, *(several if rows < wanted else ())]

    def _evaluator(self) -> Evaluator:
        config, section, teachers = self.config, self.config.eval, self._teachers
        length = config.rollout.max_new_tokens
        sampling = Sampling(max_new_tokens=length, temperature=section.temperature, stop=config.rollout.stop)
        held_out = prompts_fingerprint(self._held_out)
        return Evaluator(
            measure=measure_of(held_out, section.samples_per_prompt, section.temperature, section.reward, length),
            prompts=self._held_out,
            samples_per_prompt=section.samples_per_prompt,
            scorer=self._measured,
            teacher=teachers.teacher,
            mixed={} if teachers.ensemble is None else teachers.ensemble.mixed,
            teacher_logp_floor=config.objective.teacher_logp_floor,
            watched=config.log.samples,
            sampling=sampling,
            extra_temperatures=section.extra_temperatures,
            layout=config.train.layout,
            tokens_per_microbatch=config.train.microbatch,
            pad_id=self.pad_id,
            seed=config.seed,
            ranks=self.ranks,
        )

    def _trainable(self) -> PreTrainedModel:
        model, lora = self.loaded.model, self.config.student.lora
        if lora is None:
            check_trainable(model, self.config.student.model)
            return model
        try:
            return add_lora(model, lora, seed=derive_seed(self.config.seed, 0, "lora"))
        except ValueError as error:  # peft's, for a module name that the model lacks
            raise ConfigError(
                f"student.lora.target_modules='{lora.target_modules}' does not fit {type(model).__name__}: {error} "
                "Use all-linear, or names such as q_proj,v_proj."
            ) from error

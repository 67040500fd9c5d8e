"""Answers of both models before the first step, and what the doctor's checks say about them. Each is drawn and scored as a run does it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch

from opd.data.pack import pack
from opd.doctor.alignment import check_alignment, scoring_kind, undrawable
from opd.doctor.check import FROM_DATA, FROM_TEACHER, Check, skipped
from opd.doctor.ends import EndMass, end_mass
from opd.doctor.reward import check_reward
from opd.doctor.start import COOLER, Answers, Distance, check_distance, check_lengths, check_task
from opd.doctor.stop_mass import Ends, check_stop_mass, check_student_ends
from opd.errors import NonFiniteError, ServerError
from opd.losses import Objective
from opd.rewards import Scorer, load_reward
from opd.samplers.base import AdjustableSampler, Sampler, draw
from opd.seeding import derive_seed
from opd.teachers.base import Teacher
from opd.teachers.exact_server import ExactServerTeacher
from opd.teachers.server import RemoteTeacher
from opd.trainer.from_config import RunComponents
from opd.trainer.guardrails import memory_advice
from opd.trainer.load_models import make_sampler, sampling_of
from opd.trainer.metrics import TokenMetrics, repetition
from opd.trainer.scoring import scored_batches
from opd.types import Batch, Prompt, Rollout

ALIGNED_PROMPTS = 4
ALIGNED_TOKENS = 32
GROUPS = 3  # prompts whose samples show whether rewards differ within a group


class FirstLook:
    """Draws what the checks look at, once."""

    def __init__(self, parts: RunComponents, prompts: int) -> None:
        """`prompts` is the number of training prompts that both models answer."""
        self.parts = parts
        self.config = parts.config
        self.prompts = parts.schedule.take(0, min(prompts, len(parts.schedule)))
        ensemble = parts.teachers.ensemble
        self._choice = None if ensemble is None else ensemble.choice

    def prompts_of(self, name: str) -> list[Prompt]:
        """The prompts that a teacher may be asked about."""
        choice = self._choice
        return [p for p in self.prompts if choice is None or choice(p).get(name, 0.0) > 0]

    # --- answers ------------------------------------------------------------------------------------------------------

    @cached_property
    def student_answers(self) -> list[Rollout]:
        """One answer to each prompt, as training draws them."""
        began = time.perf_counter()
        answers = self._draw(self.parts.student_sampler, self.prompts)
        self._drawn_in = time.perf_counter() - began
        return answers

    def _of_a_step(self, seconds: float) -> float:
        """Seconds for all responses of a step, from those for the student's answers here: more than it takes where larger batches pay."""
        train = self.config.train
        return seconds * train.prompts_per_step * train.samples_per_prompt / len(self.student_answers)

    @cached_property
    def teacher_answers(self) -> list[Rollout] | None:
        """The teacher's answers to the same prompts, with the student's rendering of them; None for a teacher that draws none."""
        sampler = self._teacher_sampler
        if sampler is None:
            return None
        try:
            return self._draw(sampler, self.prompts)
        except ServerError as error:
            self._silent = f"The teacher's server wrote no answers: {error}"
            return None

    @cached_property
    def _silent(self) -> str:
        """The reason why no answers of the teacher are looked at."""
        if any(isinstance(one, ExactServerTeacher) for one in self.parts.teachers.served.values()):
            return "Not looked at, because opd serve-teacher scores answers and writes none."
        return "Not looked at, because the teacher draws no answers of its own here."

    @cached_property
    def _teacher_sampler(self) -> AdjustableSampler | None:
        parts = self.parts
        return parts.teachers.sampler(self.config.rollout, parts.pad_id, student=parts.loaded, servers=True)

    @property
    def _warm_up(self) -> str:
        return FROM_DATA if self.parts.teachers.served else FROM_TEACHER

    def _draw(self, sampler: Sampler, prompts: Sequence[Prompt], samples: int = 1) -> list[Rollout]:
        with memory_advice("rollout"):
            return draw(sampler, prompts, samples, seed=derive_seed(self.config.seed, 0, "doctor"))

    # --- alignment and ends -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def alignment(self) -> list[Check]:
        """One check for each teacher."""
        members = self.parts.teachers.members
        checks = [self._alignment(name, teacher) for name, teacher in members.items()]
        return checks or [skipped("alignment", "The recipe has no teacher.")]

    def _alignment(self, name: str, teacher: Teacher) -> Check:
        parts = self.parts
        prompts = self.prompts_of(name)[:ALIGNED_PROMPTS]
        title = "alignment" if name == "teacher" else f"alignment/{name}"
        if not prompts:
            return skipped(title, f"None of the {len(self.prompts)} prompts is this teacher's.")
        length = min(ALIGNED_TOKENS, self.config.rollout.max_new_tokens)
        greedy = replace(sampling_of(self.config.rollout), temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=length)
        loaded = parts.teachers.loaded.get(name)
        sampler: AdjustableSampler = parts.student_sampler
        if loaded is not None:
            sampler = make_sampler(
                self.config.rollout,
                loaded,
                parts.teachers.vocabulary,
                parts.pad_id,
                source="teacher",
                student_renderer=parts.renderer,
                model_context=teacher.context,
            )
        try:
            answers = self._draw(sampler.with_sampling(greedy), prompts)
        except NonFiniteError:
            return undrawable("student" if loaded is None else "teacher", title)
        with memory_advice("teacher"):
            return check_alignment(
                teacher,
                answers,
                self._student_logp(answers),
                own=loaded is not None,
                room=self.config.rollout.max_new_tokens,
                name=title,
            )

    def _student_logp(self, answers: Sequence[Rollout]) -> list[torch.Tensor]:
        """Log-probs (nats) of each answer's tokens, in the order of the answers."""
        found: dict[int, torch.Tensor] = {}
        for batch in self._pack(answers):
            values = self.parts.student.log_prob(batch, 1.0).float().cpu()
            sizes = [len(r.response_ids) for r in batch.rollouts]
            found |= {r.id: part for r, part in zip(batch.rollouts, values.split(sizes), strict=True)}
        return [found[answer.id] for answer in answers]

    def _pack(self, answers: Sequence[Rollout], keep: Sequence[torch.Tensor] | None = None) -> list[Batch]:
        train = self.config.train
        return pack(
            answers,
            None,
            layout=train.layout,
            tokens_per_microbatch=train.microbatch,
            pad_id=self.parts.pad_id,
            device=self.parts.student.device,
            keep=keep,
        )

    @torch.no_grad()
    def stop_mass(self) -> list[Check]:
        """The ends of each teacher's answers; and those of the student's, where a server knows a part of the distribution or writes no
        answers."""
        teachers = self.parts.teachers
        if not teachers.members:
            return [skipped("stop mass", "The recipe has no teacher.")]
        found = []
        for name, teacher in teachers.members.items():
            suffix = "" if name == "teacher" else f"/{name}"
            found.append(self._stop_mass(name, teacher, f"stop mass{suffix}"))
            if name not in teachers.loaded:
                ends = self._ends(name, teacher, [a for a in self.student_answers if self._asks(name, a)])
                found.append(check_student_ends(ends, name=f"student's ends{suffix}"))
        return found

    def _asks(self, name: str, answer: Rollout) -> bool:
        return self._choice is None or self._choice(answer.prompt).get(name, 0.0) > 0

    def _stop_mass(self, name: str, teacher: Teacher, title: str) -> Check:
        if self.teacher_answers is None:
            return skipped(title, self._silent)
        answers = [a for a in self.teacher_answers if self._asks(name, a)]
        truncated = sum(not a.finished for a in answers) / max(1, len(answers))
        return check_stop_mass(self._ends(name, teacher, answers), truncated=truncated, name=title)

    def _ends(self, name: str, teacher: Teacher, answers: Sequence[Rollout]) -> Ends:
        """Where these answers end, as both models see it."""
        parts, (declared, seen) = self.parts, self._teacher_eos(name, teacher)
        ids = [i for i in dict.fromkeys((*parts.loaded.eos, *declared, *seen)) if i < teacher.vocabulary.size]
        ended = [a for a in answers if a.finished and a.response_ids[-1] in ids]
        student, nothing = [0.0] * len(ids), (0.0,) * len(ids)
        taught = EndMass(least=nothing, most=nothing)
        kind = scoring_kind(teacher)
        if ended:
            with memory_advice("teacher"):
                student = self._student_ends(ended, ids)
                taught = end_mass(teacher, ended, ids, kind)
        objective = parts.config.objective
        return Ends(
            student=dict(zip(ids, student, strict=True)),
            teacher=dict(zip(ids, taught.least, strict=True)),
            most=dict(zip(ids, taught.most, strict=True)),
            told=getattr(teacher, "top_k", 0) if kind == "top_k" else 0,
            tokens={i: parts.renderer.token_strings([i])[0] for i in ids},
            count=len(ended),
            student_eos=parts.loaded.eos,
            teacher_eos=declared,
            groups=objective.eos_groups,
            groupable=objective.support == "full",
            warm_up=self._warm_up,
        )

    def _teacher_eos(self, name: str, teacher: Teacher) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that a teacher declares as ends, and those that nothing declares and its answers or its tokenizer show."""
        teachers = self.parts.teachers
        served = teachers.served.get(name)
        if name in teachers.loaded:
            return teachers.loaded[name].eos, ()
        if isinstance(served, ExactServerTeacher):
            return served.served.eos_ids, ()
        if not isinstance(served, RemoteTeacher):
            return (), ()
        own = served.renderer.tokenizer.eos_token_id
        known = [own] if isinstance(own, int) else []
        if not self.config.rollout.stop:  # a stop string ends answers at any token
            known += [a.response_ids[-1] for a in self.teacher_answers or [] if a.finished and self._asks(name, a)]
        return (), tuple(known)

    def _student_ends(self, ended: Sequence[Rollout], ids: Sequence[int]) -> list[float]:
        last = [torch.arange(len(a.response_ids)) == len(a.response_ids) - 1 for a in ended]
        rows = [self.parts.student.logits(batch).float().softmax(-1)[:, ids].cpu() for batch in self._pack(ended, last)]
        return torch.cat(rows).mean(0).tolist()

    # --- where the run starts -----------------------------------------------------------------------------------------

    def start(self) -> list[Check]:
        """Distance, lengths and the task's reward."""
        student, teacher = self.student_answers, self.teacher_answers
        lengths = check_lengths(
            _counts(student),
            None if not teacher else _counts(teacher),
            self.config.rollout.max_new_tokens,
            self._warm_up,
        )
        drawn = {"rollouts of a step, about (s)": self._of_a_step(self._drawn_in)}
        lengths = replace(lengths, numbers={**lengths.numbers, **drawn})
        return [self._distance(), lengths, self._task()]

    @torch.no_grad()
    def _distance(self) -> Check:
        parts, teacher = self.parts, self.parts.teacher
        if teacher is None:
            return skipped("start/distance", "The recipe has no teacher.")
        kind, objective = teacher.exact_kind, Objective(teacher_logp_floor=self.config.objective.teacher_logp_floor)
        if kind is None:
            kind, objective = parts.teachers.kind, self.config.objective
        assert kind is not None
        train, metrics, began = self.config.train, TokenMetrics(), time.perf_counter()
        with memory_advice("eval"):
            batches = scored_batches(
                self.student_answers,
                teacher,
                kind,
                layout=train.layout,
                tokens_per_microbatch=train.microbatch,
                pad_id=parts.pad_id,
                device=parts.student.device,
            )
            for batch in batches:
                parts.student.loss(batch, objective, metrics)
        names = ("reverse_kl", "forward_kl", "overlap", "student_entropy", "teacher_entropy")
        columns = {
            name: [float(values.mean()) for _, values in metrics.per_rollout(name) if len(values)] for name in names
        }
        found = check_distance(Distance(**columns), self._warm_up)
        scored = {"scores of a step, about (s)": self._of_a_step(time.perf_counter() - began)}
        return replace(found, numbers={**found.numbers, **scored})

    def _task(self) -> Check:
        if self._unasked is not None:
            return skipped("start/task", self._unasked)
        student, teacher = self._rewards
        if not teacher:
            return skipped("start/task", self._silent)
        return check_task(student, teacher, reward=self._reward_name, cooler=self._cooler_rewards)

    @cached_property
    def _cooler_rewards(self) -> tuple[float, ...]:
        """The student's rewards at a lower temperature."""
        sampling = sampling_of(self.config.rollout)
        cooler = replace(sampling, temperature=COOLER * sampling.temperature)
        return self._ask(self._draw(self.parts.student_sampler.with_sampling(cooler), self._task_prompts))

    @property
    def _reward_name(self) -> str:
        """The reward that the run learns from, otherwise that of evaluations."""
        config = self.config
        return (config.rl.reward if config.rl.rewarded else None) or config.eval.reward

    @cached_property
    def _unasked(self) -> str | None:
        """The reason why no reward can be asked; None where it can."""
        reward = self._reward_name
        compares = reward in ("exact_match", "numeric_answer") or reward.startswith("regex:")
        if not compares or all(p.answer is not None for p in self._task_prompts):
            return None
        return (
            f"{reward} compares with an answer, and the prompts have none (prompts.answer_column="
            f"{self.config.prompts.answer_column})."
        )

    @cached_property
    def _task_prompts(self) -> Sequence[Prompt]:
        """The training prompts where they have answers, otherwise the held-out ones, if there are any."""
        evaluator = self.parts.evaluator
        if evaluator is None or all(p.answer is not None for p in self.prompts):
            return self.prompts
        return evaluator.prompts[: len(self.prompts)]

    @cached_property
    def _task_answers(self) -> tuple[list[Rollout], list[Rollout]]:
        """The student's answers and the teacher's, none where it draws none."""
        if self._task_prompts is self.prompts:
            return self.student_answers, self.teacher_answers or []
        sampler = None if self.teacher_answers is None else self._teacher_sampler
        theirs = [] if sampler is None else self._draw(sampler, self._task_prompts)
        return self._draw(self.parts.student_sampler, self._task_prompts), theirs

    @cached_property
    def _scorer(self) -> Scorer:
        """Failures count as 0 and are reported."""
        config, parts = self.config, self.parts
        if config.rl.rewarded and parts.scorer.reinforcement is not None:
            return replace(parts.scorer.reinforcement.scorer, on_error="zero")
        if parts.evaluator is not None:
            return replace(parts.evaluator.scorer, on_error="zero")
        return Scorer(reward=load_reward(config.eval.reward), timeout=config.reward.timeout, on_error="zero")

    @cached_property
    def _rewards(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        self.failures: list[str] = []
        began = time.perf_counter()
        mine, theirs = (self._ask(answers) for answers in self._task_answers)
        self.seconds = (time.perf_counter() - began) / max(1, len(mine) + len(theirs))
        return mine, theirs

    def _ask(self, answers: Sequence[Rollout]) -> tuple[float, ...]:
        scores = self._scorer.score([(a.prompt, a.text) for a in answers], [a.finished for a in answers])
        self.failures += scores.failures
        return scores.values

    def reward(self) -> list[Check]:
        """One check of the reward that the run learns from, or that evaluations use."""
        if self._unasked is not None:
            return [skipped("reward", self._unasked)]
        config = self.config
        student, teacher = self._rewards
        groups: list[tuple[float, ...]] = []
        if config.rl.rewarded:
            size = config.train.samples_per_prompt
            values = self._ask(self._draw(self.parts.student_sampler, self._task_prompts[:GROUPS], size))
            groups = [values[i : i + size] for i in range(0, len(values), size)]
        return [
            check_reward(
                student,
                teacher,
                seconds=self.seconds,
                failures=self.failures,
                groups=groups,
                name=self._reward_name,
                rewarded=config.rl.rewarded,
            )
        ]


def _counts(answers: Sequence[Rollout]) -> Answers:
    return Answers(
        truncated=statistics.fmean(not a.finished for a in answers),
        mean_length=statistics.fmean(len(a.response_ids) for a in answers),
        repetition=statistics.fmean(repetition(a.response_ids) for a in answers),
    )

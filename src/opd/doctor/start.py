"""Checks of where a run starts: the distance of the two models on the student's answers, their lengths, and the task's reward."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from opd.doctor.check import FROM_TEACHER, Check, Number, Verdict
from opd.reporting.findings import MANY_CUT
from opd.reporting.intervals import mean_interval, paired_share_interval, wilson_interval

LOW_OVERLAP = 0.4  # of the 16 likeliest tokens; two pairs that trained well on their own answers began at 0.57 and 0.59 (benchmarks/LOG.md)
NEARLY_ALL = 0.9  # of the answers
SELDOM = 0.1
COOLER = 0.5  # of rollout.temperature
REPEATS = 0.5  # of an answer's 4-grams have occurred in it before


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Counts of one model's answers, one answer to each prompt."""

    truncated: float
    """Share cut off at the length limit."""
    mean_length: float
    """In tokens."""
    repetition: float
    """Mean share of an answer's 4-grams that occurred in it before."""


@dataclass(frozen=True, kw_only=True)
class Distance:
    """The student's answers as both models see them; one number per answer, the mean over its tokens."""

    reverse_kl: Sequence[float] = ()
    """In nats; this and the others are empty where the teacher cannot tell."""
    forward_kl: Sequence[float] = ()
    overlap: Sequence[float] = ()
    """Share of the likeliest tokens, 16 at most, that both agree on."""
    student_entropy: Sequence[float] = ()
    teacher_entropy: Sequence[float] = ()


def estimate(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean and its 95 % interval."""
    return (statistics.fmean(values), *mean_interval(values))


def check_distance(distance: Distance, warm_up: str = FROM_TEACHER) -> Check:
    """Initial reverse and forward KL, overlap and entropies, with intervals. `warm_up`, here and below, is the key that mixes the
    teacher's answers into the student's."""
    measured = {
        "reverse KL": distance.reverse_kl,
        "forward KL": distance.forward_kl,
        "overlap": distance.overlap,
        "student's entropy": distance.student_entropy,
        "teacher's entropy": distance.teacher_entropy,
    }
    numbers: dict[str, Number] = {name: estimate(values) for name, values in measured.items() if values}
    shared = statistics.fmean(distance.overlap) if distance.overlap else 1.0
    if shared < LOW_OVERLAP:
        return Check(
            name="start/distance",
            verdict="yellow",
            seen=f"The models share {shared:.0%} of their likeliest tokens, which is below {LOW_OVERLAP:.0%}.",
            numbers=numbers,
            why="On answers that the teacher would never have begun, it says little about how to go on.",
            mend=f"{warm_up}, to warm up on teacher samples first",
        )
    return Check(name="start/distance", verdict="green", seen="The models are near enough to start.", numbers=numbers)


def check_lengths(student: Answers, teacher: Answers | None, max_new_tokens: int, warm_up: str = FROM_TEACHER) -> Check:
    """Truncated share, mean length and repetition of the student's answers, beside the teacher's where it can draw any."""
    numbers: dict[str, Number] = {
        "cut off": student.truncated,
        "mean length": student.mean_length,
        "repetition": student.repetition,
    }
    if teacher is not None:
        numbers |= {"teacher cut off": teacher.truncated, "teacher's mean length": teacher.mean_length}
    verdict, seen, mend = _lengths(student, teacher, max_new_tokens, warm_up)
    why = "A cut answer cannot be right by its end, and does not teach the student to end." if mend else ""
    return Check(name="start/lengths", verdict=verdict, seen=seen, numbers=numbers, why=why, mend=mend)


def _lengths(student: Answers, teacher: Answers | None, limit: int, warm_up: str) -> tuple[Verdict, str, str]:
    severe: Verdict = "red" if student.truncated >= NEARLY_ALL else "yellow"
    share = f"{student.truncated:.0%}"
    if student.truncated >= MANY_CUT and teacher is not None and teacher.truncated <= SELDOM:
        return (
            severe,
            f"The student never ends: {share} of its answers are cut off at rollout.max_new_tokens={limit}, and {teacher.truncated:.0%} of "
            "the teacher's.",
            f"{warm_up}, which shows the student answers that end; or rollout.stop",
        )
    if student.truncated >= MANY_CUT:
        return (
            severe,
            f"Answers are cut off at rollout.max_new_tokens={limit}: {share} of the student's.",
            f"rollout.max_new_tokens: {4 * limit}",
        )
    if student.repetition >= REPEATS:
        return (
            "yellow",
            f"The student repeats itself: {student.repetition:.0%} of its 4-grams occurred before in the same answer.",
            f"{warm_up}, or an instruction-tuned student.model",
        )
    return "green", "Answers end by themselves.", ""


def check_task(
    student: Sequence[float], teacher: Sequence[float], *, reward: str, cooler: Sequence[float] = ()
) -> Check:
    """The task's reward of both models on the same prompts, one answer each, and the difference, each with its 95 % interval. `cooler`
    are the student's rewards at a lower temperature, COOLER times that of training."""
    low, high, difference = _difference(student, teacher)
    numbers: dict[str, Number] = {
        "student's reward": _reward_estimate(student),
        "teacher's reward": _reward_estimate(teacher),
        "difference": (difference, low, high),
        "prompts": len(student),
    }
    if cooler:
        numbers[f"student's at {COOLER:g} of the temperature"] = _reward_estimate(cooler)
    mine, cooled, theirs = (f"{statistics.fmean(x):.3g}" if x else "" for x in (student, cooler, teacher))
    if low > 0 and (not cooler or _difference(cooler, teacher)[0] > 0):
        return Check(name="start/task", verdict="green", seen="The teacher is better at this task.", numbers=numbers)
    if low > 0:
        return Check(
            name="start/task",
            verdict="yellow",
            seen=f"A lower temperature does as much: {reward} gives the student {mine}, {cooled} at {COOLER:g} of the temperature, and the "
            f"teacher {theirs}.",
            numbers=numbers,
            why="What such a run gains may be had without training, by sampling the student at a lower temperature.",
            mend="eval.extra_temperatures: [0.0, 0.5], which show whether training does more than sharpen; or a better teacher.model",
        )
    worse = high < 0
    return Check(
        name="start/task",
        verdict="red" if worse else "yellow",
        seen=f"The teacher is {'worse' if worse else 'no better'} at this task: {reward} gives it {theirs}, and the student {mine}.",
        numbers=numbers,
        why="A student that follows its teacher does not get past it; there is little to gain"
        + (", and what it has is lost." if worse else "."),
        mend="teacher.model: one that is better at these prompts"
        + ("" if worse else ", or --prompts with a higher number where the interval is wide"),
    )


def _reward_estimate(rewards: Sequence[float]) -> tuple[float, float, float]:
    if set(rewards) <= {0.0, 1.0}:
        return (statistics.fmean(rewards), *wilson_interval(int(sum(rewards)), len(rewards)))
    return estimate(rewards)


def _difference(student: Sequence[float], teacher: Sequence[float]) -> tuple[float, float, float]:
    """Lower end, upper end, and mean of teacher − student over the same prompts."""
    apart = [t - s for s, t in zip(student, teacher, strict=True)]
    if set(student) | set(teacher) <= {0.0, 1.0}:
        low, high = paired_share_interval(apart.count(1.0), apart.count(-1.0), len(apart))
    else:
        low, high = mean_interval(apart)
    return low, high, statistics.fmean(apart)

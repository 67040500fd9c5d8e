"""Check of a reward: it answers, fast enough, and not the same to everything."""

from __future__ import annotations

from collections.abc import Sequence

from opd.doctor.check import Check, Number, Verdict

SLOW_S = 1.0  # a call; a step of 256 answers would wait for minutes


def check_reward(
    student: Sequence[float],
    teacher: Sequence[float],
    *,
    seconds: float,
    failures: Sequence[str],
    groups: Sequence[Sequence[float]] = (),
    name: str,
    rewarded: bool,
) -> Check:
    """`student` and `teacher` are rewards of their answers, `seconds` the mean time of a call, and `groups` the rewards of several samples
    of one prompt each. `rewarded`: the run learns from the reward, by comparing within groups."""
    values = [*student, *teacher, *(value for group in groups for value in group)]
    idle = sum(len(set(group)) == 1 for group in groups)
    numbers: dict[str, Number] = {
        "student": tuple(student[:4]),
        "teacher": tuple(teacher[:4]),
        "answers": len(values),
        "ms per call": 1000 * seconds,
    }
    if groups:
        numbers["groups without signal"] = f"{idle} of {len(groups)}"
    verdict: Verdict = "green"
    seen, why, mend = f"{name} tells answers apart.", "", ""
    if failures:
        verdict = "red"
        seen = f"{len(failures)} of {len(values)} calls failed and count as 0: {failures[0]}"
        why = "A failed call says nothing about the answer."
        mend = "eval.reward or rl.reward: a function that takes every answer"
    elif len(set(values)) == 1:
        verdict = "red" if rewarded else "yellow"
        seen = f"{name} gives {values[0]:g} to all {len(values)} answers of both models."
        why = "A constant reward has no gradient." if rewarded else "Evaluations could not tell a better student."
        mend = "eval.reward or rl.reward: one that fits the answers' format; read answers with log.show_samples"
    elif groups and idle == len(groups):
        verdict = "yellow"
        seen = f"{name} is the same for all samples of each of {len(groups)} prompts."
        why = "Rewards are compared within the samples of a prompt (rl.advantage), so that such prompts teach nothing."
        mend = "train.samples_per_prompt: more, or a finer reward"
    elif seconds > SLOW_S:
        verdict = "yellow"
        seen = f"A call of {name} takes {seconds:.2g} s."
        why = "A step asks once for every answer, one after the other."
        mend = "train.prompts_per_step: fewer, or a faster reward"
    return Check(name="reward", verdict=verdict, seen=seen, numbers=numbers, why=why, mend=mend)

"""Check of the ids that end an answer: how much probability each model gives each of them where the teacher's answers end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from opd.doctor.check import Check, Number

OTHER_MEMBERS = 0.5  # total variation between two shares; 1 is one id to the student and another to the teacher
HARDLY = 0.1  # of the probability, where the teacher ends: such a student runs on
ENDS = 0.5


def check_stop_mass(
    student: Mapping[int, float],
    teacher: Mapping[int, float],
    *,
    tokens: Mapping[int, str],
    student_eos: Sequence[int],
    teacher_eos: Sequence[int],
    ends: int,
    truncated: float,
    groups: Sequence[Sequence[int]] = (),
    name: str = "stop mass",
) -> Check:
    """`student` and `teacher` are each id's mean probability over the ends of `ends` answers of the teacher; `truncated` is the share of
    its answers that have no end. `tokens` spells the ids; those of one of `groups` (objective.eos_groups) count as one."""
    numbers: dict[str, Number] = {"ends": ends, "teacher cut off": truncated}
    numbers |= {f"{tokens[i]!r} ({i})": f"student {student[i]:.3g}, teacher {teacher[i]:.3g}" for i in student}
    if ends == 0:
        return Check(
            name=name,
            verdict="yellow",
            seen="No answer of the teacher ends before rollout.max_new_tokens.",
            numbers=numbers,
            why="A student that learns from such a teacher does not learn to end.",
            mend="rollout.max_new_tokens: a higher limit, or rollout.stop: strings that end an answer",
        )
    mine, theirs = sum(student.values()), sum(teacher.values())
    if mine < HARDLY and theirs >= ENDS:
        return Check(
            name=name,
            verdict="yellow",
            seen=f"Where the teacher ends, the student ends with a probability of {mine:.3g}, and the teacher with {theirs:.3g}.",
            numbers=numbers,
            why="The student's answers run on to the length limit, and a cut answer does not teach it to end.",
            mend="rollout.lmbda: 0.5 with rollout.off_policy: teacher, which shows the student answers that end",
        )
    student, teacher = _grouped(student, groups), _grouped(teacher, groups)
    apart = 0.5 * sum(abs(student[i] / mine - teacher[i] / theirs) for i in student) if mine > 0 and theirs > 0 else 0.0
    numbers["shares apart"] = apart
    if apart <= OTHER_MEMBERS:
        return Check(name=name, verdict="green", seen="Both models end with the same ids.", numbers=numbers)
    own, wanted = (max(side, key=lambda i: side[i]) for side in (student, teacher))
    alike = set(student_eos) == set(teacher_eos)
    return Check(
        name=name,
        verdict="red",
        seen=f"The teacher ends with {tokens[wanted]!r} ({wanted}) and the student with {tokens[own]!r} ({own})"
        + (", though both declare the same ids." if alike else "."),
        numbers=numbers,
        why="The student is taught out of its own end before it has learnt the teacher's, so answers run on (arXiv 2609.20511).",
        mend=f"objective.eos_groups: [[{wanted}, {own}]], which counts both as one end; or, for the teacher's own end, eos_token_id: {wanted} "
        "in the student's generation_config.json and rollout.lmbda: 0.5 with rollout.off_policy: teacher",
    )


def _grouped(shares: Mapping[int, float], groups: Sequence[Sequence[int]]) -> dict[int, float]:
    """The probabilities of a group at its first member."""
    first = {token: group[0] for group in groups for token in group}
    found: dict[int, float] = {}
    for token, share in shares.items():
        found[first.get(token, token)] = found.get(first.get(token, token), 0.0) + share
    return found

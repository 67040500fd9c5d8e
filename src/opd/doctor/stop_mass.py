"""Checks of the ids that end an answer: how much probability each model gives each of them where answers end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from opd.doctor.check import FROM_TEACHER, Check, Number, skipped

OTHER_MEMBERS = 0.5  # total variation between two shares; 1 is one id to the student and another to the teacher
HARDLY = 0.1  # of the probability, where the teacher ends: such a student runs on
ENDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Each id's mean probability over the last tokens of `count` answers, by both models."""

    student: Mapping[int, float]
    teacher: Mapping[int, float]
    tokens: Mapping[int, str]
    """The ids, spelt out."""
    count: int
    most: Mapping[int, float] = field(default_factory=dict[int, float])
    """The most that the teacher can give an id, for a teacher that tells its likeliest tokens alone; `teacher` is then the least."""
    told: int = 0
    """Tokens that such a teacher tells at each place."""
    student_eos: Sequence[int] = ()
    teacher_eos: Sequence[int] = ()
    """Those that it declares; empty where nothing says them."""
    groups: Sequence[Sequence[int]] = ()
    """objective.eos_groups: the ids of a group count as one."""
    groupable: bool = True
    """The recipe's loss can take such groups."""
    warm_up: str = FROM_TEACHER
    """The key that mixes the teacher's answers into the student's."""

    def limit(self, token: int) -> float:
        """The most that the teacher can give an id."""
        return self.most.get(token, self.teacher[token])

    def numbers(self) -> dict[str, Number]:
        """A line for each id."""
        return {f"{self.tokens[i]!r} ({i})": f"student {self.student[i]:.3g}, {self._said(i)}" for i in self.student}

    def _said(self, token: int) -> str:
        low, high = self.teacher[token], self.limit(token)
        if high - low < 1e-9:
            return f"teacher {low:.3g}"
        within = f"the top {self.told}" if self.told else "what it tells"
        return (
            f"teacher {low:.3g} to {high:.3g}" if low > 0 else f"teacher not seen within {within}: at most {high:.3g}"
        )


def check_stop_mass(ends: Ends, *, truncated: float, name: str = "stop mass") -> Check:
    """The ends of the teacher's answers; `truncated` is the share of its answers that have no end."""
    numbers: dict[str, Number] = {"ends": ends.count, "teacher cut off": truncated, **ends.numbers()}
    if ends.count == 0:
        return Check(
            name=name,
            verdict="yellow",
            seen="No answer of the teacher ends before rollout.max_new_tokens.",
            numbers=numbers,
            why="A student that learns from such a teacher does not learn to end.",
            mend="rollout.max_new_tokens: a higher limit, or rollout.stop: strings that end an answer",
        )
    mine, theirs = sum(ends.student.values()), sum(ends.teacher.values())
    if mine < HARDLY and theirs >= ENDS:
        return Check(
            name=name,
            verdict="yellow",
            seen=f"Where the teacher ends, the student ends with a probability of {mine:.3g}, and the teacher with {theirs:.3g}.",
            numbers=numbers,
            why="The student's answers run on to the length limit, and a cut answer does not teach it to end.",
            mend=f"{ends.warm_up}, which shows the student answers that end",
        )
    return _other_ends(ends, numbers, name) or Check(
        name=name, verdict="green", seen="Both models end with the same ids.", numbers=numbers
    )


def check_student_ends(ends: Ends, *, name: str = "student's ends") -> Check:
    """The ends of the student's answers, of which a teacher that writes none of its own can still be asked."""
    if ends.count == 0:
        return skipped(
            name, "No answer of the student ends before rollout.max_new_tokens, so there is no end to ask about."
        )
    numbers: dict[str, Number] = {"ends": ends.count, **ends.numbers()}
    theirs = sum(ends.teacher.values())
    highest = min(1.0, sum(ends.limit(i) for i in ends.teacher))
    if highest < HARDLY:
        return Check(
            name=name,
            verdict="yellow",
            seen=f"Where the student ends, the teacher ends with a probability of at most {highest:.3g}.",
            numbers=numbers,
            why="The student is taught to go on there, so its answers grow to the length limit.",
            mend="log.show_samples, to read some answers; where they are whole, the teacher ends with another id: add it to eos_token_id in "
            "the student's generation_config.json",
        )
    other = _other_ends(ends, numbers, name) if theirs >= ENDS else None
    known = f"{theirs:.3g}" if highest - theirs < 1e-9 else f"{theirs:.3g} to {highest:.3g}"
    seen = f"Where the student ends, the teacher ends with a probability of {known}."
    return other or Check(name=name, verdict="green", seen=seen, numbers=numbers)


def _other_ends(ends: Ends, numbers: dict[str, Number], name: str) -> Check | None:
    """The red check of two models that end with different ids; adds to the numbers how far apart they are."""
    mine, theirs = sum(ends.student.values()), sum(ends.teacher.values())
    student, teacher = _grouped(ends.student, ends.groups), _grouped(ends.teacher, ends.groups)
    apart = 0.5 * sum(abs(student[i] / mine - teacher[i] / theirs) for i in student) if mine > 0 and theirs > 0 else 0.0
    numbers["shares apart"] = apart
    if apart <= OTHER_MEMBERS:
        return None
    own, wanted = (max(side, key=lambda i: side[i]) for side in (student, teacher))
    together = (
        f"objective.eos_groups: [[{wanted}, {own}]], which counts both as one end; or, for the teacher's own end, "
    )
    together = together if ends.groupable else ""
    alike = set(ends.student_eos) == set(ends.teacher_eos)
    return Check(
        name=name,
        verdict="red",
        seen=f"The teacher ends with {ends.tokens[wanted]!r} ({wanted}) and the student with {ends.tokens[own]!r} ({own})"
        + (", though both declare the same ids." if alike else "."),
        numbers=numbers,
        why="The student is taught out of its own end before it has learnt the teacher's, so answers run on (arXiv 2609.20511).",
        mend=f"{together}eos_token_id: {wanted} in the student's generation_config.json and {ends.warm_up}",
    )


def _grouped(shares: Mapping[int, float], groups: Sequence[Sequence[int]]) -> dict[int, float]:
    """The probabilities of a group at its first member."""
    first = {token: group[0] for group in groups for token in group}
    found: dict[int, float] = {}
    for token, share in shares.items():
        found[first.get(token, token)] = found.get(first.get(token, token), 0.0) + share
    return found

"""Checks that a teacher's scores are about the tokens they stand beside: not shifted, not uniform, not NaN, not another model's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch

from opd.doctor.check import Check, Number
from opd.errors import OpdError
from opd.losses import to_logp
from opd.teachers.base import Teacher
from opd.types import AnyTarget, DenseTarget, HiddenTarget, Rollout, SampledTarget, TargetKind, TopKTarget

if TYPE_CHECKING:
    from torch import Tensor

NEAR_UNIFORM = 0.98  # of ln V: a model that answers has a fraction of it, and rounding alone leaves 1
SHIFTED = 0.1  # nats by which a neighbour's token is likelier, where each token is the likeliest one of its row
FAR_WORSE = 1.0  # nats by which the student's log-prob of the teacher's own greedy answer is higher
REACTS = (
    0.02  # total variation of a row that must not have changed; servers that batch in bfloat16 make some thousandths
)
REACTS_LOGP = 0.5  # nats, where a row is one log-prob
STILL = 1e-4  # of a row that must have changed, in the same units
PROBED = 8  # tokens of the response of which one is changed, where there is room
CHANGED = 3  # its place
FEWEST = CHANGED + 3  # tokens that show a row after the changed token, and one after that
OTHERS = 4  # tokens that take its place in turn: two tokens may mean the same to what follows


def scoring_kind(teacher: Teacher) -> TargetKind:
    """The kind of target that tells most of this teacher's distribution."""
    if teacher.exact_kind is not None:
        return teacher.exact_kind
    # A server that is bound to send sampled tokens alone may refuse to send more.
    bound = getattr(teacher, "kind", None)
    return "top_k" if "top_k" in teacher.supplies and bound != "sampled" else "sampled"


def check_alignment(
    teacher: Teacher,
    answers: Sequence[Rollout],
    student_logp: Sequence[Tensor],
    *,
    own: bool,
    room: int,
    name: str = "alignment",
) -> Check:
    """Look at the teacher's scores of some answers: its own greedy ones where `own`, the student's otherwise. `student_logp` are the
    student's log-probs (nats) of their tokens, one tensor [tokens] per answer. `room` is how many tokens an answer may have."""
    scores = Scores(teacher, answers)
    worst_case = -math.log(scores.vocabulary)
    means = scores.shifts()
    student = float(torch.cat(list(student_logp)).mean())
    numbers: dict[str, Number] = {
        "answers": "the teacher's own" if own else "the student's",
        "teacher's log-prob": means[0],
        "nats more at shift −1": scores.excess(-1),
        "at shift +1": scores.excess(1),
        "student's log-prob": student,
        "−ln V": worst_case,
        "teacher's entropy": scores.entropy,
    }
    problem = _not_finite(scores, student) or _uniform(scores, worst_case)
    # Tokens that somebody else wrote need not be likely, so a neighbour may fit better by chance.
    problem = problem or (_shifted(scores) if own else None) or _reacts_wrongly(teacher, answers, room)
    problem = problem or _another_model(means[0], student, worst_case, own)
    if problem is None:
        seen = "The teacher's scores stand beside the tokens that they are about."
        return Check(name=name, verdict="green", seen=seen, numbers=numbers)
    seen, why, mend = problem
    return Check(name=name, verdict="red", seen=seen, numbers=numbers, why=why, mend=mend)


Flat = DenseTarget | TopKTarget | SampledTarget
Problem = tuple[str, str, str]
"""What was seen, why it matters, and what mends it."""


class Scores:
    """A teacher's say about some answers, as log-probs of any token at any row."""

    def __init__(
        self, teacher: Teacher, answers: Sequence[Rollout], targets: Sequence[AnyTarget] | None = None
    ) -> None:
        """`targets` are what the teacher has said already; by default it is asked. Raises OpdError for a target of another length."""
        self.vocabulary = teacher.vocabulary.size - len(teacher.vocabulary.invalid_ids)
        self.answers = answers
        said = teacher.score(answers, scoring_kind(teacher)) if targets is None else targets
        self.targets = [_flat(teacher, target) for target in said]
        for answer, target in zip(answers, self.targets, strict=True):
            if len(target) != len(answer.response_ids):
                raise OpdError(
                    f"{teacher.name} scored {len(target)} positions of {len(answer.response_ids)} response tokens; a target has one row "
                    "per response token."
                )
        self.ids = [torch.tensor(answer.response_ids) for answer in answers]

    @property
    def finite(self) -> bool:
        """No score is NaN or +∞, and each row has a token that can occur."""
        return all(bool(_best(target).isfinite().all()) for target in self.targets)

    @property
    def entropy(self) -> float | None:
        """Mean entropy (nats) of its rows; None where the rows are not whole."""
        whole = [_entropy(target) for target in self.targets if isinstance(target, DenseTarget)]
        return float(torch.cat(whole).mean()) if whole else None

    @property
    def best(self) -> float:
        """Mean log-prob of the likeliest token of each row, or of the scored one where no other is known."""
        return float(torch.cat([_best(target) for target in self.targets]).mean())

    def shifts(self) -> Mapping[int, float]:
        """Mean log-prob (nats) of the token beside each row, under key 0, and of its neighbours, under −1 and 1."""
        return {shift: _mean([row for row, _ in self._pairs(shift)]) for shift in (-1, 0, 1)}

    def excess(self, shift: int) -> float | None:
        """How much likelier (nats) the token `shift` places on is than the token beside the row, on average; None where it is unknown."""
        pairs = self._pairs(shift)
        return _mean([there - here for there, here in pairs]) if pairs else None

    def _pairs(self, shift: int) -> list[tuple[Tensor, Tensor]]:
        """For every answer, the log-probs of the token `shift` places on, and of the one beside, at the rows that have both."""
        found = []
        for target, ids in zip(self.targets, self.ids, strict=True):
            if shift and (isinstance(target, SampledTarget) or len(ids) < 2):
                continue
            rows = torch.arange(max(0, -shift), len(ids) - max(0, shift))
            found.append((_logp(target, rows, ids[rows + shift]), _logp(target, rows, ids[rows])))
        return found


def _not_finite(scores: Scores, student: float) -> Problem | None:
    for side, fine in (("teacher", scores.finite), ("student", math.isfinite(student))):
        if not fine:
            return _nan_of(side)
    return None


def _nan_of(side: str) -> Problem:
    return (
        f"The {side}'s scores are NaN or infinite.",
        "Nothing can be learnt from such numbers: the first step would stop with an error.",
        f"{side}.model: a checkpoint without NaN in its weights, or {side}.dtype: float32",
    )


def undrawable(side: str, name: str) -> Check:
    """The check of a model, student or teacher, from which no answer can be drawn because of NaN."""
    seen, why, mend = _nan_of(side)
    return Check(name=name, verdict="red", seen=seen, why=why, mend=mend)


def _uniform(scores: Scores, worst_case: float) -> Problem | None:
    measured = scores.entropy if scores.entropy is not None else -scores.best
    if measured < NEAR_UNIFORM * -worst_case:
        return None
    return (
        f"The teacher's scores are uniform: {measured:.3g} nats, and ln V is {-worst_case:.3g}.",
        "A teacher that finds all tokens equally likely makes the student forget what it knows.",
        "teacher.model: a checkpoint with its output layer (lm_head), or a server that has loaded its weights",
    )


def _shifted(scores: Scores) -> Problem | None:
    for shift in (-1, 1):
        excess = scores.excess(shift)
        if excess is not None and excess > SHIFTED:
            side = "before" if shift < 0 else "after"
            return _shift_problem(f"by {excess:.3g} nats a token, the scores fit the token {side} better")
    return None


def _shift_problem(evidence: str) -> Problem:
    return (
        f"The teacher's scores are shifted by one: {evidence}.",
        "Each token would be judged by what the teacher says about its neighbour.",
        "teacher.url or teacher.api: a server that returns the log-prob of each token given those before it",
    )


def _another_model(teacher: float, student: float, worst_case: float, own: bool) -> Problem | None:
    if teacher > worst_case and (not own or teacher > student - FAR_WORSE):
        return None
    against = (
        f"guessing has {worst_case:.3g}" if teacher <= worst_case else f"the student gives these answers {student:.3g}"
    )
    whose = "its own greedy answers" if own else "the student's greedy answers"
    return (
        f"The teacher gives {whose} a mean log-prob of {teacher:.3g} nats, and {against}.",
        "Such scores come from another model, another tokenizer or another prompt than the recipe names.",
        "teacher.model, or teacher.served_model: the model that the scores should come from",
    )


def _reacts_wrongly(teacher: Teacher, answers: Sequence[Rollout], room: int) -> Problem | None:
    """Change one token of a response: the row after it has to change, and no row before that may. This tells a shift where the answers
    themselves cannot, because they repeat one token, or because another model wrote them."""
    probes = _changed_in_one_token(teacher, answers, min(PROBED, room))
    if len(probes) < 2:
        return None
    plain, *changed = [_flat(teacher, target) for target in teacher.score(probes, scoring_kind(teacher))]
    moved = torch.stack([_distances(plain, other) for other in changed]).amax(0)
    # A distribution changes one row after the token; the log-prob of the changed token itself changes beside it.
    alone = isinstance(plain, SampledTarget)
    first = CHANGED if alone else CHANGED + 1
    if float(moved[first - 1]) > (REACTS_LOGP if alone else REACTS):
        return _shift_problem(f"the row before changes when token {CHANGED} of a response does")
    if float(moved[first]) < STILL and float(moved[first + 1 :].max()) > STILL:
        return _shift_problem(f"the row that should be the first to change with token {CHANGED} of a response does not")
    return None


def _changed_in_one_token(teacher: Teacher, answers: Sequence[Rollout], size: int) -> list[Rollout]:
    """A response to the shortest prompt, and the same with others in the place of one token."""
    vocabulary = teacher.vocabulary
    invalid = set(vocabulary.invalid_ids)
    ends = {a.response_ids[-1] for a in answers if a.finished}
    known = [i for i in range(vocabulary.size) if i not in invalid and i not in ends]
    owned = set(known)
    written = [i for a in answers for i in a.response_ids if i in owned] or known
    if not known or size < FEWEST:
        return []
    ids = (written * size)[:size]
    spread = [known[(2 * place + 1) * len(known) // (2 * OTHERS)] for place in range(OTHERS)]
    shortest = min(answers, key=lambda answer: len(answer.prompt_ids))
    plain = replace(shortest, response_ids=tuple(ids), sampler_logp=None, sampler_entropy=None, finished=False)
    changed = [(*ids[:CHANGED], other, *ids[CHANGED + 1 :]) for other in dict.fromkeys(spread) if other != ids[CHANGED]]
    return [plain, *(replace(plain, response_ids=response) for response in changed)]


def _distances(one: Flat, two: Flat) -> Tensor:
    """How far apart two says are, per row: the total variation of two distributions or of what is known of them, or nats between two
    log-probs."""
    if isinstance(one, DenseTarget) and isinstance(two, DenseTarget):
        return 0.5 * (to_logp(one.logits).exp() - to_logp(two.logits).exp()).abs().sum(-1)
    if isinstance(one, TopKTarget) and isinstance(two, TopKTarget):
        rows = torch.arange(len(one))
        columns = zip(one.teacher_logp.T, one.ids.T, strict=True)
        return 0.5 * torch.stack([(logp.exp() - _logp(two, rows, ids).exp()).abs() for logp, ids in columns]).sum(0)
    assert isinstance(one, SampledTarget) and isinstance(two, SampledTarget)
    return (one.teacher_logp - two.teacher_logp).abs()


def _flat(teacher: Teacher, target: object) -> Flat:
    """The target in float32 on the CPU, hidden states as logits."""
    if isinstance(target, HiddenTarget):
        return DenseTarget(logits=teacher.logits(target).float().cpu())
    if isinstance(target, DenseTarget):
        return DenseTarget(logits=target.logits.float().cpu())
    if isinstance(target, TopKTarget):
        return TopKTarget(ids=target.ids.cpu(), teacher_logp=target.teacher_logp.float().cpu())
    return SampledTarget(teacher_logp=cast(SampledTarget, target).teacher_logp.float().cpu())


def _logp(target: Flat, rows: Tensor, ids: Tensor) -> Tensor:
    """Log-probs (nats) of these tokens at these rows. A token outside a top-k has at most the probability that the k leave, and at most
    that of the last of them."""
    if isinstance(target, SampledTarget):
        return target.teacher_logp[rows]
    if isinstance(target, DenseTarget):
        return to_logp(target.logits[rows]).gather(-1, ids[:, None])[:, 0]
    logp, hit = target.teacher_logp[rows], target.ids[rows] == ids[:, None]
    left = torch.log1p(-logp.exp().sum(-1).clamp(max=1 - 1e-6))
    return torch.where(hit.any(-1), (logp.masked_fill(~hit, -torch.inf)).amax(-1), torch.minimum(left, logp[:, -1]))


def _best(target: Flat) -> Tensor:
    if isinstance(target, DenseTarget):
        return to_logp(target.logits).amax(-1)  # NaN where any logit is
    return target.teacher_logp[:, 0] if isinstance(target, TopKTarget) else target.teacher_logp


def _entropy(target: DenseTarget) -> Tensor:
    logp = to_logp(target.logits)
    return -(logp.exp() * logp.clamp(min=-1e4)).sum(-1)


def _mean(parts: Sequence[Tensor]) -> float:
    return float(torch.cat(list(parts)).mean()) if parts else math.nan

"""Is the teacher answering the question? Scores that are uniform, of another position, or no numbers would train towards noise.

Looked at in the first update and every `canary_every` updates, before any gradient is used.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd.errors import ModelError
from opd.kernels import linear_log_prob
from opd.types import AnyTarget, Head, HiddenTarget, TeacherMixture, TopKTarget

TOKENS = 512
"""Looked at, at most."""
FEWEST = 32
"""Of so few tokens nothing is concluded about positions."""
UNIFORM_NATS = 0.01
SHIFT_NATS = 1.0
"""By so much the tokens of another position must be likelier than those that were sampled here, on average,"""
SHIFT_SIGMAS = 5.0
"""and by so many standard errors."""
DRAWN_SHARE = 0.5
"""Of that gain, so much must be left on tokens that the student might as well have drawn. A model that repeats what it reads, as one
with random weights and tied embeddings does, fits the very token that was drawn; a prediction of another position fits all of them."""
ROWS = 64
"""Of logits, at a time."""
ADVICE = "No update was made. Look at the teacher's weights and tokenizer (and its server); opd.canary_every=0 switches this check off."


def check_teacher(
    target: AnyTarget,
    ids: Tensor,
    sequence_index: Tensor,
    student_logp: Tensor,
    *,
    vocab: int,
    name: str = "",
    student: HiddenTarget | None = None,
) -> None:
    """Raise ModelError for a teacher whose scores cannot be meant.

    `ids` are the response tokens of the target's rows in order, `sequence_index` their sequences, `student_logp` (nats) what the
    student gives them, and `student` what its scores of other tokens come from, in the same rows.
    """
    if isinstance(target, TeacherMixture):
        for number, member in enumerate(target.targets, start=1):
            check_teacher(
                member, ids, sequence_index, student_logp, vocab=vocab, name=f"number {number}", student=student
            )
        return
    who = f"the teacher '{name}'" if name else "the teacher"
    rows = slice(0, TOKENS)
    if not isinstance(target, (HiddenTarget, TopKTarget)) or not len(ids):
        return
    first, ids, sequence_index, student_logp = _rows(target, rows), ids[rows], sequence_index[rows], student_logp[rows]
    said = first.hidden if isinstance(first, HiddenTarget) else first.teacher_logp
    bad = (said.isnan() | (said == torch.inf)).any(-1)
    if bool(bad.any()):
        raise ModelError(f"{who} gives NaN at {int(bad.sum())} of {len(ids)} response tokens. {ADVICE}")
    if _uniform(first, ids, vocab):
        raise ModelError(
            f"{who} gives every token the same probability, at all of {len(ids)} response tokens: it knows nothing. {ADVICE}"
        )
    own = None if student is None else HiddenTarget(hidden=student.hidden[rows], head=student.head)
    _refuse_shifted(first, ids, sequence_index, student_logp, own, vocab, who)


def _refuse_shifted(
    target: HiddenTarget | TopKTarget,
    ids: Tensor,
    sequence_index: Tensor,
    student_logp: Tensor,
    student: HiddenTarget | None,
    vocab: int,
    who: str,
) -> None:
    """Raise ModelError for scores that fit the next or the previous token better, as a prediction of it does."""
    logp = _log_probs(target, ids)
    same = sequence_index[1:] == sequence_index[:-1]
    if int(same.sum()) < FEWEST:
        return
    for which, here, there in (
        ("next", slice(None, -1), slice(1, None)),
        ("previous", slice(1, None), slice(None, -1)),
    ):
        rows = _rows(target, here)
        moved = _log_probs(rows, ids[there])[same]
        gain = (moved - logp[here][same]).nan_to_num(0.0)
        error = float(gain.std()) / math.sqrt(len(gain))
        plausible = float(moved.mean()) > float(student_logp[here][same].mean()) - SHIFT_NATS
        if not plausible or float(gain.mean()) <= max(SHIFT_NATS, SHIFT_SIGMAS * error):
            continue
        if student is not None:
            other = _expected(rows, student.hidden[there], student.head, vocab)
            own = _expected(rows, student.hidden[here], student.head, vocab)
            if float((other - own)[same].mean()) <= DRAWN_SHARE * float(gain.mean()):
                continue
        raise ModelError(
            f"{who} seems shifted by one: at {len(gain)} response tokens its scores fit the {which} token better than the token "
            f"itself, by {float(gain.mean()):.1f} nats on average. {ADVICE}"
        )


@torch.no_grad()
def _expected(target: HiddenTarget | TopKTarget, hidden: Tensor, head: Head, vocab: int) -> Tensor:
    """Σ p log q at each row, nats: q the target's, p what the student's states [rows, hidden] make likely."""
    found = []
    for start in range(0, len(hidden), ROWS):
        part = slice(start, start + ROWS)
        p = _logits(hidden[part], head, vocab).softmax(-1)
        one = _rows(target, part)
        if isinstance(one, HiddenTarget):
            logq = _logits(one.hidden, one.head, vocab).log_softmax(-1)
            found.append(torch.where(p > 0, p * logq, 0.0).sum(-1))
            continue
        inside = one.teacher_logp.isfinite() & (one.ids < vocab)
        lowest = torch.where(inside, one.teacher_logp, torch.inf).amin(-1, keepdim=True)
        over = torch.where(inside, one.teacher_logp - lowest, 0.0)
        found.append((p.gather(-1, one.ids.clamp_max(vocab - 1)) * over).sum(-1) + lowest.squeeze(-1))
    return torch.cat(found)


def _logits(hidden: Tensor, head: Head, vocab: int) -> Tensor:
    """[rows, vocab] in float32; the product in the head's own dtype, of which no copy is made."""
    bias = None if head.bias is None else head.bias[:vocab].to(head.weight.dtype)
    return torch.nn.functional.linear(hidden.to(head.weight.dtype), head.weight[:vocab], bias).float()


def _rows(target: HiddenTarget | TopKTarget, rows: slice) -> HiddenTarget | TopKTarget:
    if isinstance(target, HiddenTarget):
        return HiddenTarget(hidden=target.hidden[rows], head=target.head)
    return TopKTarget(ids=target.ids[rows], teacher_logp=target.teacher_logp[rows])


@torch.no_grad()
def _log_probs(target: HiddenTarget | TopKTarget, ids: Tensor) -> Tensor:
    """The teacher's log-prob of each id, nats; for one outside its top k, that of the least likely inside."""
    if isinstance(target, HiddenTarget):
        head = target.head
        return linear_log_prob(target.hidden, head.weight, ids, bias=head.bias)[0]
    shown = torch.where(target.teacher_logp.isfinite(), target.teacher_logp, torch.inf)
    lowest = shown.amin(-1)
    hit = target.ids == ids.unsqueeze(-1)
    found = torch.where(hit, target.teacher_logp, -torch.inf).amax(-1)
    return torch.where(hit.any(-1), found, lowest)


@torch.no_grad()
def _uniform(target: HiddenTarget | TopKTarget, ids: Tensor, vocab: int) -> bool:
    if isinstance(target, HiddenTarget):
        entropy = linear_log_prob(target.hidden, target.head.weight, ids, bias=target.head.bias)[1]
        return bool((entropy > math.log(vocab) - UNIFORM_NATS).all())
    if target.ids.shape[-1] < 2:
        return False
    shown = target.teacher_logp
    return bool((shown.amax(-1) - shown.amin(-1) < UNIFORM_NATS).all())

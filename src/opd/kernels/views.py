"""The say of both models at response tokens, for a person to read: log-probs, entropies and likeliest tokens.

The sources are the hidden states and the target that the loss was made from. All is at temperature 1 over the common vocabulary, as
`reverse_kl` and the other diagnostics are, whatever the temperatures of the objective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from operator import itemgetter

import torch
from torch import Tensor

from opd.kernels.checks import check_ids, check_shapes
from opd.kernels.chunk_loop import HeadLogits, TeacherLogits, exact_float32
from opd.kernels.spec import Columns, RowSpec, head_spec, log_probs, under_autocast
from opd.losses import Objective, entropy, gather_logp, likeliest, support_of
from opd.losses._shapes import Float, Int
from opd.types import AnyTarget, DenseTarget, ModelView, SampledTarget, TeacherMixture, TokenViews, TopKTarget

LIKELIEST = 5
CHUNK = 64  # tokens: of 152k columns 39 MiB a copy, which do not show beside the chunks of the loss


@torch.no_grad()
def linear_views(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    target: AnyTarget | None,
    response_ids: Int[Tensor, " tokens"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    valid_vocab: int | None = None,
    masked_ids: tuple[int, ...] = (),
    teacher_temperature: float = 1.0,
    k: int = LIKELIEST,
    chunk_tokens: int = CHUNK,
) -> tuple[ModelView, ModelView]:
    """Student's and teacher's views, from hidden states; logits exist for one chunk of tokens at a time.

    A HiddenTarget, a DenseTarget and a TeacherMixture of probabilities or logits (mixed at `teacher_temperature`, as the loss mixes them)
    tell everything; a TopKTarget has no entropy, and no more tokens than it names; a SampledTarget has the log-prob alone. Added losses
    (mixture="loss") have no one distribution: the teacher's view is empty, as it is without a target.

    Inside `torch.autocast` the student's operands are rounded as those of the loss are (`linear_objective`).
    Raises ObjectiveError for shapes, dtypes and ids that do not fit.
    """
    check_shapes(hidden, weight, bias, target, None, response_ids, None, None)
    head = head_spec(
        hidden, weight, bias, target, valid_vocab=valid_vocab, masked_ids=masked_ids, chunk_tokens=chunk_tokens
    )
    check_ids("response_ids", response_ids, head.columns.vocab)
    student = HeadLogits(under_autocast(head))
    buffer = student.buffer()

    def logits(rows: slice) -> Tensor:
        return student.logits(rows, buffer[: rows.stop - rows.start], -torch.inf)

    with torch.autocast(hidden.device.type, enabled=False), exact_float32(hidden.device):
        rows = _rows(head.columns, target, response_ids, teacher_temperature)
        return _views(student.chunks(), logits, rows, student.buffer, k)


@torch.no_grad()
def views_from_logits(
    student_logits: Float[Tensor, "tokens vocab"],
    target: AnyTarget | None,
    response_ids: Int[Tensor, " tokens"],
    *,
    teacher_temperature: float = 1.0,
    k: int = LIKELIEST,
) -> tuple[ModelView, ModelView]:
    """`linear_views` from whole logits, −inf at masked tokens; `target` holds no hidden states."""
    tokens, vocab = student_logits.shape
    chunks = [slice(start, min(start + CHUNK, tokens)) for start in range(0, tokens, CHUNK)]
    dtype = torch.promote_types(student_logits.dtype, torch.float32)

    def buffer() -> Tensor:
        return student_logits.new_empty(min(tokens, CHUNK), vocab, dtype=dtype)

    rows = _rows(Columns.whole(vocab), target, response_ids, teacher_temperature)
    return _views(chunks, lambda part: student_logits[part].to(dtype), rows, buffer, k)


def by_sequence(
    views: tuple[ModelView, ModelView], positions: Int[Tensor, " tokens"], sequence_index: Int[Tensor, " tokens"]
) -> dict[int, TokenViews]:
    """The views of each sequence, on the CPU. `positions` are the tokens' places in their responses, from 0."""
    student, teacher = (_each(view, torch.Tensor.cpu) for view in views)
    positions, sequence_index = positions.cpu(), sequence_index.cpu()
    found = {}
    for sequence in sequence_index.unique().tolist():
        own = sequence_index == sequence
        mine, its = (_each(view, itemgetter(own)) for view in (student, teacher))
        found[sequence] = TokenViews(positions=positions[own], student=mine, teacher=its)
    return found


def _each(view: ModelView, change: Callable[[Tensor], Tensor]) -> ModelView:
    columns = {field.name: getattr(view, field.name) for field in fields(view)}
    return ModelView(**{name: change(column) for name, column in columns.items() if column is not None})


def _rows(columns: Columns, target: AnyTarget | None, response_ids: Tensor, temperature: float) -> RowSpec:
    if isinstance(target, TeacherMixture) and target.mixture == "loss":
        target = None
    if not isinstance(target, TeacherMixture):
        temperature = 1.0  # of one teacher it would be taken out again
    objective = Objective(teacher_temperature=temperature)
    return RowSpec(columns=columns, objective=objective, target=target, response_ids=response_ids)


def _views(
    chunks: Iterable[slice],
    student_logits: Callable[[slice], Tensor],
    rows: RowSpec,
    new_buffer: Callable[[], Tensor],
    k: int,
) -> tuple[ModelView, ModelView]:
    teacher, temperature = TeacherLogits(rows, new_buffer), rows.objective.teacher_temperature
    students, teachers = [], []
    for part in chunks:
        some = rows.at(part, whole_targets=False)
        assert some.response_ids is not None
        students.append(_whole_view(student_logits(part), some.response_ids, k))
        logits = teacher.logits(part, part.stop - part.start, -torch.inf)
        if logits:
            at_one = logits[0][1] if temperature == 1.0 else logits[0][1] * temperature
            teachers.append(_whole_view(at_one, some.response_ids, k))
        else:
            teachers.append(_partial_view(some.target, k))
    return _joined(students), _joined(teachers)


def _whole_view(logits: Tensor, response_ids: Tensor, k: int) -> ModelView:
    logp = log_probs(logits)
    best = likeliest(logp, min(k, logp.shape[-1]))
    return ModelView(
        logp=gather_logp(logp, response_ids), entropy=entropy(logp), top_ids=best[1], top_probabilities=best[0].exp()
    )


def _partial_view(target: AnyTarget | None, k: int) -> ModelView:
    """The view of a target that names some tokens."""
    if isinstance(target, TopKTarget):
        logp = support_of(target.ids).mask(target.teacher_logp)
        best = logp.topk(min(k, logp.shape[-1]), dim=-1)
        ids = target.ids.gather(-1, best.indices)
        return ModelView(logp=target.sampled_logp, top_ids=ids, top_probabilities=best.values.exp())
    assert target is None or isinstance(target, (SampledTarget, DenseTarget))
    return ModelView(logp=target.teacher_logp) if isinstance(target, SampledTarget) else ModelView()


def _joined(views: Sequence[ModelView]) -> ModelView:
    """One after the other, what all of them have."""
    columns = {field.name: [getattr(view, field.name) for view in views] for field in fields(ModelView)}
    return ModelView(**{n: torch.cat(c) for n, c in columns.items() if c and all(part is not None for part in c)})

"""Teacher logits and top-k log-probs from hidden states, by the products that the student's rows go through.

With the same rows in a chunk they give the same bits, so that a teacher that is the student differs from it by exactly nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opd.kernels.checks import check_ids, check_shapes
from opd.kernels.chunk_loop import HeadLogits, exact_float32
from opd.kernels.spec import head_spec, log_probs
from opd.losses import gather_logp, likeliest
from opd.losses._shapes import Float, Int
from opd.types import Head, TopKTarget


def top_k_of(logp: Float[Tensor, "tokens vocab"], response_ids: Int[Tensor, " tokens"], k: int) -> TopKTarget:
    """The k likeliest tokens of each row, likeliest first, and the response token's log-prob."""
    values, ids = likeliest(logp, k)
    return TopKTarget(ids=ids, teacher_logp=values, sampled_logp=gather_logp(logp, response_ids))


@torch.no_grad()
def linear_top_k(
    hidden: Float[Tensor, "tokens hidden"],
    head: Head,
    response_ids: Int[Tensor, " tokens"],
    k: int,
    *,
    valid_vocab: int | None = None,
    masked_ids: tuple[int, ...] = (),
    chunk_tokens: int | None = None,
) -> TopKTarget:
    """`top_k_of` the log-probs (nats, float32) that `head` gives at each hidden state; logits exist for one chunk at a time.

    Raises ObjectiveError for shapes, dtypes and ids that do not fit.
    """
    parts = []
    for rows, logits in _chunks(hidden, head, response_ids, valid_vocab, masked_ids, chunk_tokens):
        parts.append(top_k_of(log_probs(logits), response_ids[rows], k))
    known = [part.sampled_logp for part in parts if part.sampled_logp is not None]
    return TopKTarget(
        ids=torch.cat([part.ids for part in parts]),
        teacher_logp=torch.cat([part.teacher_logp for part in parts]),
        sampled_logp=torch.cat(known),
    )


@torch.no_grad()
def linear_logits(
    hidden: Float[Tensor, "tokens hidden"],
    head: Head,
    *,
    valid_vocab: int | None = None,
    masked_ids: tuple[int, ...] = (),
) -> Float[Tensor, "tokens vocab"]:
    """All the logits in float32, over the valid vocabulary, −inf at `masked_ids`, for callers that need all of them."""
    return torch.cat([logits.clone() for _, logits in _chunks(hidden, head, None, valid_vocab, masked_ids, None)])


def _chunks(
    hidden: Tensor,
    head: Head,
    response_ids: Tensor | None,
    valid_vocab: int | None,
    masked_ids: tuple[int, ...],
    chunk_tokens: int | None,
) -> Iterator[tuple[slice, Tensor]]:
    """Logits of one chunk of tokens after the other, in the same buffer."""
    check_shapes(hidden, head.weight, head.bias, None, None, response_ids, None, None)
    valid = [rows for rows in (valid_vocab, head.valid_vocab) if rows is not None]
    spec = head_spec(
        hidden,
        head.weight,
        head.bias,
        valid_vocab=min(valid) if valid else None,
        masked_ids=masked_ids,
        chunk_tokens=chunk_tokens,
    )
    check_ids("response_ids", response_ids, spec.columns.vocab)
    student = HeadLogits(spec)
    buffer = student.buffer()
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in student.chunks() if spec.tokens else [slice(0, 0)]:
            with exact_float32(hidden.device):
                logits = student.logits(rows, buffer[: rows.stop - rows.start], -torch.inf)
            yield rows, logits

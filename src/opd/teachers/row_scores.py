"""What a server says of one rollout, checked before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from opd.remote.questions import BadAnswer
from opd.teachers.vocabulary import VocabularyMatch
from opd.types import SampledTarget, TopKTarget

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

ROUNDING = 1e-3  # nats by which two roundings of one bfloat16 sum may part, and a sum of probabilities pass 1
NO_PROBABILITY = -9999.0  # vLLM's −inf, which JSON has no number for


@dataclass(frozen=True, kw_only=True)
class Row:
    """One rollout as a server reads it."""

    prompt_ids: tuple[int, ...]
    """The teacher's rendering of the prompt."""
    response_ids: tuple[int, ...]

    @property
    def ids(self) -> list[int]:
        """What is sent."""
        return [*self.prompt_ids, *self.response_ids]


@dataclass(frozen=True, kw_only=True)
class Position:
    """A server's words about one response token: the log-prob of the token itself, and those of its likeliest tokens by id."""

    token: int
    token_logp: float
    likeliest: Mapping[int, float]
    """k entries, or k + 1 where the token itself was added to them."""


@dataclass(frozen=True, kw_only=True)
class RowScores:
    """The teacher's log-probs (nats) at every response token of a row, its likeliest tokens first."""

    ids: Int[Tensor, "tokens k"]
    logp: Float[Tensor, "tokens k"]
    sampled_logp: Float[Tensor, " tokens"]

    def target(self, kind: str) -> TopKTarget | SampledTarget:
        """The target of this kind."""
        if kind == "sampled":
            return SampledTarget(teacher_logp=self.sampled_logp)
        return TopKTarget(ids=self.ids, teacher_logp=self.logp, sampled_logp=self.sampled_logp)


def row_scores(row: Row, positions: Sequence[Position], k: int, vocabulary: VocabularyMatch) -> RowScores:
    """The positions as tensors. Raises BadAnswer for what no model can have said of this row: its log-probs are those of other tokens,
    of too few, or no log-probs."""
    if len(positions) != len(row.response_ids):
        raise BadAnswer(f"{len(positions)} positions for {len(row.response_ids)} response tokens")
    ranked = [_ranked(position, place, k) for place, position in enumerate(positions)]
    ids = torch.tensor([[token for token, _ in entries] for entries in ranked], dtype=torch.long).reshape(
        len(ranked), k
    )
    logp = torch.tensor([[value for _, value in entries] for entries in ranked], dtype=torch.float32).reshape(
        len(ranked), k
    )
    sampled = torch.tensor([position.token_logp for position in positions], dtype=torch.float32)
    _check_numbers(torch.cat([sampled.unsqueeze(-1), logp], dim=-1))
    if k:
        foreign = ids[~vocabulary.owns(ids) | (ids < 0)]
        if len(foreign):
            raise BadAnswer(
                f"the token id {int(foreign[0])} among its likeliest, which is no token of the student (of {vocabulary.size} rows): its model "
                "has another vocabulary"
            )
        _check_agreement(torch.tensor(row.response_ids), ids, logp, sampled)
    return RowScores(ids=ids, logp=logp, sampled_logp=sampled)


def _ranked(position: Position, place: int, k: int) -> list[tuple[int, float]]:
    """The k likeliest, most likely first. An entry more is the token itself, which stands below them."""
    entries = dict(position.likeliest)
    if len(entries) == k + 1:
        entries.pop(position.token, None)
    if len(entries) != k:
        raise BadAnswer(
            f"{len(position.likeliest)} of its likeliest tokens at response token {place}, where {k} were asked for"
        )
    return sorted(entries.items(), key=lambda entry: -entry[1])


def _check_numbers(logp: Tensor) -> None:
    wrong = ~logp.isfinite() | (logp > ROUNDING)
    if bool(wrong.any()):
        place = int(wrong.any(-1).nonzero()[0])
        raise BadAnswer(f"{float(logp[wrong][0]):g} as a log-prob, at response token {place}")
    if bool((logp <= NO_PROBABILITY).any()):
        place = int((logp <= NO_PROBABILITY).any(-1).nonzero()[0])
        raise BadAnswer(
            f"a token that cannot occur, at response token {place}: its log-probs are cut off by a top-p, a top-k or a list of forbidden "
            "tokens, and a teacher's must be its model's own"
        )


def _check_agreement(response_ids: Tensor, ids: Tensor, logp: Tensor, sampled: Tensor) -> None:
    """The token's own log-prob and those of the likeliest are of one distribution."""
    mass = logp.exp().sum(-1)
    if bool((mass > 1 + ROUNDING).any()):
        raise BadAnswer(f"probabilities that sum to {float(mass.max()):.4f}")
    among = ids == response_ids.unsqueeze(-1)
    beside = torch.where(among, logp, -torch.inf).amax(-1)  # its log-prob among the likeliest
    inside = among.any(-1)
    apart = torch.where(inside, (sampled - beside).abs(), (sampled - logp[:, -1]).clamp_min(0.0))
    if bool((apart > ROUNDING).any()):
        place = int((apart > ROUNDING).nonzero()[0])
        raise BadAnswer(
            f"{float(sampled[place]):.4f} as the log-prob of response token {place}, which its likeliest tokens contradict (they are of "
            "another position?)"
        )

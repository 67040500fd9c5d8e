"""What both models said at each token of the rollouts that are recorded: taken from the loss's own pass, told as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial

import torch

from opd.data.rendering import Renderer
from opd.reporting.record import TokenDetails, TopTokens
from opd.teachers.base import Teacher
from opd.types import Batch, ModelView, Rollout, TokenViews

Views = tuple[ModelView, ModelView]
"""The student's and the teacher's, of the same tokens."""


class ViewCollector:
    """Takes the views of some rollouts while a loss goes over micro-batches; those of a first pass stay, where there are two."""

    def __init__(self, rollouts: Iterable[Rollout] = ()) -> None:
        self.wanted = {rollout.id for rollout in rollouts}
        self.found: dict[int, TokenViews] = {}
        """By `Rollout.id`."""

    def rows(self, batch: Batch) -> torch.Tensor | None:
        """Indices of the batch's response tokens whose views are wanted; None for none."""
        ids = self.wanted - self.found.keys()
        members = [place for place, rollout in enumerate(batch.rollouts) if rollout.id in ids]
        if not members:
            return None
        chosen = torch.tensor(members, device=batch.sequence_index.device)
        rows = torch.isin(batch.sequence_index, chosen).nonzero().squeeze(-1)
        return rows if len(rows) else None

    def add(self, batch: Batch, rows: torch.Tensor, views: Views) -> None:
        """Take the views of those rows of the batch."""
        places, sequences = positions(batch)[rows].cpu(), batch.sequence_index[rows].cpu()
        on_cpu = [_each(view, torch.Tensor.cpu) for view in views]
        for member in sequences.unique().tolist():
            own = sequences == member
            student, teacher = (_each(view, partial(_rows, own)) for view in on_cpu)
            found = TokenViews(positions=places[own], student=student, teacher=teacher)
            self.found[batch.rollouts[member].id] = found


def positions(batch: Batch) -> torch.Tensor:
    """The place of each of the batch's tokens in its response, [tokens], from 0."""
    lengths = [len(rollout.response_ids) for rollout in batch.rollouts]
    every = torch.cat([torch.arange(length) for length in lengths]).to(batch.response_ids.device)
    return every if batch.kept is None else every[batch.kept]


def token_details(rollout: Rollout, views: TokenViews | None, renderer: Renderer) -> TokenDetails | None:
    """The views as a record holds them: one entry per response token, NaN and no likeliest tokens where a token was left out."""
    if views is None:
        return None if rollout.sampler_logp is None else TokenDetails(sampler_logp=rollout.sampler_logp)
    length, places = len(rollout.response_ids), views.positions.tolist()
    found: dict[str, Sequence[float]] = {}
    tops: dict[str, TopTokens] = {}
    for who, view in (("student", views.student), ("teacher", views.teacher)):
        columns = {"logp": view.logp, "entropy": view.entropy}
        found |= {f"{who}_{name}": _placed(c, places, length) for name, c in columns.items() if c is not None}
        if view.top_ids is not None and view.top_probabilities is not None:
            tops[f"{who}_top"] = _top_tokens(view.top_ids, view.top_probabilities, places, length, renderer)
    return TokenDetails(sampler_logp=rollout.sampler_logp, **found, **tops)  # pyright: ignore[reportArgumentType]


def teacher_names(teacher: Teacher | None, rollouts: Sequence[Rollout]) -> Mapping[int, str]:
    """The teacher that each rollout is routed to, by `Rollout.id`; empty where there is one teacher, or none."""
    groups = {} if teacher is None else teacher.groups(rollouts)
    return {rollouts[i].id: name for name, members in groups.items() if name for i in members}


def _each(view: ModelView, change: Callable[[torch.Tensor], torch.Tensor]) -> ModelView:
    columns = {field.name: getattr(view, field.name) for field in fields(view)}
    return replace(view, **{name: change(column) for name, column in columns.items() if column is not None})


def _rows(own: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    return column[own]


def _placed(values: torch.Tensor, places: Sequence[int], length: int) -> tuple[float, ...]:
    placed = [math.nan] * length
    for place, value in zip(places, values.tolist(), strict=True):
        placed[place] = value
    return tuple(placed)


def _top_tokens(
    ids: torch.Tensor, probabilities: torch.Tensor, places: Sequence[int], length: int, renderer: Renderer
) -> TopTokens:
    """A token of probability 0 is none of the likeliest, as in a vocabulary of four."""
    tokens: list[Sequence[str]] = [()] * length
    likely: list[Sequence[float]] = [()] * length
    for place, row, values in zip(places, ids.tolist(), probabilities.tolist(), strict=True):
        count = sum(value > 0 for value in values)
        tokens[place] = tuple(renderer.token_strings(row[:count]))
        likely[place] = tuple(values[:count])
    return TopTokens(tokens=tokens, probabilities=likely)

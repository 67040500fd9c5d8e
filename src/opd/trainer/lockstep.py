"""Models whose weights are divided over ranks: each rank runs them as often as it needs, and the others go along."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from opd.ranks import Ranks, Shared


class Lockstep(Shared):
    """Keeps ranks at the same collective of the same model.

    A divided model gathers its weights layer by layer from all ranks, so that all of them have to run it at the same time. Before a rank
    runs one it says so; the others are then before a run of their own, or at their next question to the ranks, and run the model too,
    on one token where they have nothing for it.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.running = False
        self.tasks: dict[str, Callable[..., Any]] = {}
        self._models: list[nn.Module] = []
        self._free: set[int] = set()
        self._silent = 0
        self._next: list[int] = []
        ranks.shared = self

    def add(self, model: nn.Module) -> int:
        """From now on this model is run in step. Its number here."""
        place = len(self._models)
        self._models.append(model)
        model.register_forward_pre_hook(partial(self._before, place), prepend=True)
        model.register_forward_hook(partial(self._after, place))
        return place

    def do(self, task: str, *arguments: Any) -> Any:
        return self.tasks[task](*arguments)

    def go_along(self) -> None:
        while wanted := self._wanted(None):
            for place in wanted:
                self.run_along(place)

    @contextmanager
    def free(self, place: int) -> Iterator[None]:
        """Inside, every rank has all weights of this model and runs it alone."""
        self._free.add(place)
        try:
            yield
        finally:
            self._free.discard(place)

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Inside, all ranks run the same models as often as each other, and need not say so."""
        self._silent += 1
        try:
            yield
        finally:
            self._silent -= 1

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Inside, the other ranks wait for this one. Where it fails it can tell them nothing but by its end."""
        self.running = True
        yield
        self.running = False

    def _before(self, place: int, _module: nn.Module, _args: Any) -> None:
        if place in self._free:
            return
        if not self._silent:
            wanted = self._wanted(place)
            self._next = [other for other in wanted if other > place]
            for other in wanted:
                if other < place:
                    self.run_along(other)
        self.running = True

    def _after(self, place: int, _module: nn.Module, _args: Any, _output: Any) -> None:
        if place in self._free:
            return
        self.running = False
        if not self._silent:
            others, self._next = self._next, []
            for other in others:
                self.run_along(other)

    def _wanted(self, own: int | None) -> list[int]:
        """Models that ranks are about to run, in order; none where all ranks ask for none."""
        said = self.ranks.add_up([int(place == own) for place in range(len(self._models))])
        return [place for place, count in enumerate(said) if count]

    @torch.no_grad()
    def run_along(self, place: int) -> None:
        """Run a model on one token, as all ranks do now."""
        model = self._models[place]
        ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        with self.in_step():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=ids.clone(), use_cache=False)

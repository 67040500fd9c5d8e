"""Several ranks as one run: rank 0 decides and says, the others do the same; rewards are asked of rank 0 alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from opd.errors import ConfigError
from opd.ranks import ALONE, Ranks
from opd.reporting.record import Who
from opd.rewards import Scorer, Scores
from opd.trainer.fingerprints import OF_A_TEXT
from opd.types import Prompt


@dataclass(frozen=True, kw_only=True)
class TakeStep:
    """All ranks are to take this step."""

    step: int
    dropping: frozenset[str]
    """Kinds of responses that rules of the guard leave out of the loss."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """All ranks are to evaluate this model."""

    who: Who
    extra: bool


@dataclass(frozen=True, kw_only=True)
class FirstRankScorer(Scorer):
    """Rewards that rank 0 computes, with its time limit, and that every rank gets."""

    ranks: Ranks = ALONE

    def score(self, answered: Sequence[tuple[Prompt, str]], finished: Sequence[bool] | None = None) -> Scores:
        """As `Scorer.score`; every rank has to ask. What fails on rank 0 ends the run on all."""
        return self.ranks.from_first(lambda: Scorer.score(self, answered, finished))


def check_same(ranks: Ranks, own: Mapping[str, object], what: str) -> None:
    """Raise ConfigError on every rank where facts differ between two, with their names. Log-probs from servers may differ by rounding."""
    if ranks.alone:
        return
    found = ranks.gather({name: value for name, value in own.items() if not name.endswith(OF_A_TEXT)})
    for rank, theirs in enumerate(found):
        names = sorted({*found[0], *theirs})
        other = [name for name in names if found[0].get(name) != theirs.get(name)]
        if other:
            shown = ", ".join(other[:5])
            raise ConfigError(
                f"{what}: rank 0 and rank {rank} differ in {shown}. Start all of them with one recipe, from one folder, in one "
                "environment: opd train recipe.yaml --devices N does."
            )


def nested(
    outer: Callable[[], AbstractContextManager[None]], inner: Callable[[], AbstractContextManager[None]]
) -> Callable[[], AbstractContextManager[None]]:
    """A context that enters one after the other."""

    @contextmanager
    def both() -> Iterator[None]:
        with outer(), inner():
            yield

    return both

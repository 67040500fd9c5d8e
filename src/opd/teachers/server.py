"""A teacher behind an inference server: token ids go there, and the log-probs of its likeliest tokens come back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from opd.data.rendering import Renderer
from opd.errors import DataError, ObjectiveError, ServerError
from opd.losses import DEFAULT_TOP_K, Objective
from opd.remote.pool import ServerPool
from opd.remote.questions import Answer, Question, neighbours
from opd.teachers.dialects import DIALECTS
from opd.teachers.identities import Identities
from opd.teachers.probe import Probe
from opd.teachers.row_scores import Row, RowScores, row_scores
from opd.teachers.vocabulary import VocabularyMatch
from opd.types import Head, HiddenTarget, Prompt, Rollout, Target, TargetKind

if TYPE_CHECKING:
    from torch import Tensor

ANSWER_ENTRIES = 1 << 17  # log-probs in an answer: about 10 MB of vLLM's JSON
SENDS: frozenset[TargetKind] = frozenset({"top_k", "sampled"})


class RemoteTeacher:
    """Renders its own prompt, sends prompt and response as token ids, and takes the log-probs at every response token.

    Every response is scored or the run stops: what a server cannot answer is asked again, of another one where the pool has one, and
    what no model can have said is refused. Log-probs are the model's own, at temperature 1, over all rows of its output layer.
    """

    exact_kind: TargetKind | None = None

    def __init__(
        self,
        pool: ServerPool,
        renderer: Renderer,
        *,
        api: str,
        vocabulary: VocabularyMatch,
        name: str = "teacher",
        served_model: str | None = None,
        supply: TargetKind | None = None,
        tokens_per_request: int = 16384,
        canary_every: int = 10,
    ) -> None:
        """Nothing is sent before `connect`. `canary_every` counts calls of `score`; 0 never looks again."""
        self.pool = pool
        self.renderer = renderer
        self.dialect = DIALECTS[api]()
        self.vocabulary = vocabulary
        self.name = name
        self.served_model = served_model
        self.supplies: frozenset[TargetKind] = SENDS if supply is None else frozenset({supply})
        self.tokens_per_request = tokens_per_request
        self.canary_every = canary_every
        self.rows = max(vocabulary.size, len(renderer.tokenizer))
        """Ids that it can read."""
        self.kind: TargetKind = "top_k"
        self.top_k = DEFAULT_TOP_K
        self.context_length: int | None = None
        """Tokens that every server reads at once; None where none says."""
        self.probe: Probe | None = None
        self.identities: Identities | None = None
        """Of the folder that its scores are kept in."""
        self._kept_as: str | None = None
        self._scored = 0

    head: Head | None = None
    """It sends no hidden states."""

    @property
    def fingerprint(self) -> str:
        """A name for what the servers say to a fixed text; known after `connect`, where its scores are kept."""
        if self._kept_as is None:
            assert self.probe is not None and self.identities is not None
            self._kept_as = self.identities.name_of(f"{self.dialect.name} {self.served_model}", self.probe.fingerprint)
        return self._kept_as

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt as it reads it."""
        return self.renderer.prompt_ids(prompt)

    def bind_objective(self, objective: Objective) -> TargetKind:
        """Settle what `score` hands out for this objective. Raises ObjectiveError when log-probs of a few tokens will not do."""
        self.kind = objective.check_supplies(self.supplies, self.name)
        self.top_k = min(objective.top_k or DEFAULT_TOP_K, self.vocabulary.size)
        self.probe = None  # it asks for as much as the run does
        return self.kind

    def connect(self) -> list[str]:
        """Find the model at every server, and see that it scores. Returns warnings; raises ServerError or VocabularyError."""
        k, tokenizer = self._k(self.kind), self.renderer.tokenizer
        probe = Probe(self.pool, self.dialect, tokenizer, vocabulary=self.vocabulary, k=k)
        served = probe.models()
        for server, model in served.items():
            if self.served_model is None and len(model.names) == 1:
                self.served_model = model.names[0]
            if self.served_model not in model.names:
                wanted = "the recipe names none" if self.served_model is None else f"not '{self.served_model}'"
                raise ServerError(
                    f"{self.pool.section}.url: {server} serves {', '.join(model.names) or 'no model'}, and {wanted}; set "
                    f"{self.pool.section}.served_model to one that all servers of the pool have."
                )
        assert self.served_model is not None
        lengths = [model.context for model in served.values() if model.context is not None]
        self.context_length = min(lengths, default=None)
        said = probe.start(self.served_model, self.context_length)
        self.probe, self._kept_as = probe, None
        return [*self.pool.warnings, *said]

    def groups(self, rollouts: Sequence[Rollout]) -> Mapping[str, Sequence[int]]:
        """All rollouts may share a micro-batch."""
        return {"": range(len(rollouts))}

    def score(self, rollouts: Sequence[Rollout], kind: TargetKind | None = None) -> list[Target]:
        """One target per rollout, in order. Raises ServerError where a rollout cannot be scored, and DataError for one that is longer
        than the servers read."""
        kind = kind or self.kind
        if kind not in SENDS:
            raise ObjectiveError(f"the server of {self.name} sends log-probs, and no targets of kind {kind}.")
        self._watch()
        rows = [
            Row(
                prompt_ids=self.renderer.prompt_ids(rollout.prompt),
                response_ids=tuple(token if token < self.rows else 0 for token in rollout.response_ids),
            )
            for rollout in rollouts
        ]
        self._check_context(rows, rollouts)
        k = self._k(kind)
        scores = self.pool.ask_all([self._question(group, k) for group in self._requests(rows, k)])
        return [one.target(kind) for group in scores for one in group]

    def logits(self, target: HiddenTarget) -> Tensor:
        """Never asked for: it supplies no hidden states."""
        raise NotImplementedError(f"{self.name} is behind a server and sends no hidden states")

    def context(self) -> AbstractContextManager[None]:
        """Nothing to do: its model is nobody else's."""
        return nullcontext()

    def _k(self, kind: TargetKind) -> int:
        return self.top_k if kind == "top_k" else 0

    def _watch(self) -> None:
        """Connect before the first rollouts; send the canary before every so many."""
        if self.probe is None:
            self.connect()
        elif self.canary_every and self._scored % self.canary_every == 0:
            self.probe.check()
        self._scored += 1

    def _requests(self, rows: list[Row], k: int) -> list[list[Row]]:
        """Neighbours that share a request: as few to each as keep every connection busy, and no more than fit in one answer."""
        size = max(1, math.ceil(len(rows) / self.pool.concurrency))
        limit = min(self.tokens_per_request, ANSWER_ENTRIES // max(1, k))
        return neighbours(rows, lambda row: len(row.ids), most_rows=size, most_tokens=limit)

    def _question(self, rows: list[Row], k: int) -> Question[list[RowScores]]:
        def read(answer: Answer) -> list[RowScores]:
            positions = self.dialect.read(answer, rows, k)
            return [row_scores(row, said, k, self.vocabulary) for row, said in zip(rows, positions, strict=True)]

        assert self.served_model is not None
        return Question(request=self.dialect.request(self.served_model, rows, k), read=read)

    def _check_context(self, rows: Sequence[Row], rollouts: Sequence[Rollout]) -> None:
        limit = self.context_length
        for row, rollout in zip(rows, rollouts, strict=True):
            if limit is not None and len(row.ids) >= limit:
                raise DataError(
                    f"Prompt {rollout.prompt.index} and its response take {len(row.ids)} tokens, and the server of {self.name} reads "
                    f"{limit - 1} and writes one. Start it with a longer --max-model-len, lower rollout.max_new_tokens, or drop the long "
                    "prompts."
                )

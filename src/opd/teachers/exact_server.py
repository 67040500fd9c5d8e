"""A teacher behind `opd serve-teacher`: hidden states come back, so any divergence stays exact over the network."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from opd.data.rendering import Renderer
from opd.errors import DataError, ObjectiveError
from opd.kernels import linear_logits
from opd.losses import DEFAULT_TOP_K, Objective
from opd.remote.address import Address
from opd.remote.pool import ServerPool
from opd.remote.questions import Answer, BadAnswer, Question, Request, neighbours
from opd.teachers.hidden_wire import Receipt, digest_of, read_answer, read_metadata, tensors_digest
from opd.teachers.served_model import ServedModel
from opd.teachers.vocabulary import VocabularyMatch
from opd.types import DenseTarget, Head, HiddenTarget, Prompt, Rollout, SampledTarget, Target, TargetKind, TopKTarget

WireDtype = Literal["bfloat16", "float32"]
Row = dict[str, Any]
"""A prompt and a response under an id, as they are sent."""
BATCHES_PER_REQUEST = 4
"""Forward passes of the server that one request is worth: enough to group by length, little to send again after a fault."""


class ExactServerTeacher:
    """Renders its own prompt, sends prompt and response as token ids, and takes the last hidden states of the response.

    The server's output layer is fetched once. Every answer says which model it comes from and which token ids it is about; one of
    another model stops the run, and one about other tokens is asked for again.
    """

    def __init__(
        self,
        pool: ServerPool,
        served: ServedModel,
        renderer: Renderer,
        *,
        vocabulary: VocabularyMatch,
        device: torch.device | str = "cpu",
        wire: WireDtype = "bfloat16",
        name: str = "teacher",
        supply: TargetKind | None = None,
    ) -> None:
        """`device` is where targets and the output layer are; `wire` is the dtype in which hidden states travel. Raises ObjectiveError
        for a `supply` that this model cannot give."""
        self.pool = pool
        self.served = served
        self.renderer = renderer
        self.vocabulary = vocabulary
        self.device = torch.device(device)
        self.wire: WireDtype = wire
        self.name = name
        self.rows = served.rows
        possible: set[TargetKind] = {"top_k", "sampled"}
        if served.hidden_reason is None:
            possible |= {"hidden", "dense"}
        if supply is not None and supply not in possible:
            raise ObjectiveError(f"{pool.section}.supply is '{supply}', and the server says: {served.hidden_reason}")
        self.supplies: frozenset[TargetKind] = frozenset(possible if supply is None else {supply})
        self.exact_kind: TargetKind | None = "hidden" if served.hidden_reason is None else None
        """The whole distribution, for evaluation, whatever the objective trains on."""
        self.kind: TargetKind = supply or self.exact_kind or "top_k"
        self.top_k = min(DEFAULT_TOP_K, vocabulary.size)
        self._head: Head | None = None
        self._numbers = itertools.count()

    @property
    def context_length(self) -> int:
        """Tokens of a prompt and its response that every server reads."""
        return self.served.limits.row_tokens

    def connect(self) -> list[str]:
        """Warnings about the servers. They have been asked already: this is made of what they said."""
        return list(self.pool.warnings)

    @property
    def fingerprint(self) -> str:
        """The served model and the dtype on the way: the same answers to the same ids."""
        return f"{self.served.identity} {self.wire}"

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt as it reads it."""
        return self.renderer.prompt_ids(prompt)

    @property
    def head(self) -> Head | None:
        """The server's output layer, fetched by the first that asks; None where hidden states are not enough. Raises ServerError."""
        if self._head is None and self.served.hidden_reason is None:
            parts = self.pool.ask(Question(request=Request(path="/v1/head", method="GET"), read=self._read_head))
            placed = {name: tensor.to(self.device) for name, tensor in parts.items()}
            self._head = Head(weight=placed["weight"], bias=placed.get("bias"))
        return self._head

    def bind_objective(self, objective: Objective) -> TargetKind:
        """Settle what `score` hands out for this objective. Raises ObjectiveError when nothing it supplies will do."""
        self.kind = objective.check_supplies(self.supplies, self.name)
        self.top_k = min(objective.top_k or DEFAULT_TOP_K, self.vocabulary.size)
        return self.kind

    def groups(self, rollouts: Sequence[Rollout]) -> Mapping[str, Sequence[int]]:
        """All rollouts may share a micro-batch."""
        return {"": range(len(rollouts))}

    def score(self, rollouts: Sequence[Rollout], kind: TargetKind | None = None) -> list[Target]:
        """One target per rollout, in order. Raises ServerError where a rollout cannot be scored or the model is another one, and
        DataError for a rollout that is longer than the server reads."""
        kind = kind or self.kind
        questions = [self._question(group, kind) for group in self._requests(self._rows(rollouts))]
        return [target for group in self.pool.ask_all(questions) for target in self._targets(group, kind)]

    def score_each(self, rollouts: Sequence[Rollout], kind: TargetKind) -> dict[Address, list[Target]]:
        """The targets of every server that is in use, of rollouts that fit in one request. Raises as `score` does."""
        answers = self.pool.ask_each(self._question(self._rows(rollouts), kind), resting=False)
        return {server: self._targets(group, kind) for server, group in answers.items()}

    def _rows(self, rollouts: Sequence[Rollout]) -> list[Row]:
        """As they are sent. Raises DataError for one that is longer than the server reads."""
        prompts = [self.prompt_ids(rollout.prompt) for rollout in rollouts]
        rows: list[Row] = [
            {
                "id": f"{next(self._numbers)}",
                "prompt": list(prompt),
                "response": [t if t < self.rows else 0 for t in rollout.response_ids],
            }
            for prompt, rollout in zip(prompts, rollouts, strict=True)
        ]
        self._check_context(rows, rollouts)
        return rows

    def logits(self, target: HiddenTarget) -> Tensor:
        """Teacher logits of a hidden target, in float32, −inf outside the common vocabulary."""
        return linear_logits(
            target.hidden, target.head, valid_vocab=self.vocabulary.size, masked_ids=self.vocabulary.invalid_ids
        )

    def context(self) -> AbstractContextManager[None]:
        """Nothing to do: its model is nobody else's."""
        return nullcontext()

    def _requests(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Neighbours that share a request: at least one request for every server, none beyond the server's limits."""
        limits, total = self.served.limits, sum(map(_length, rows))
        share = -(-total // len(self.pool.addresses))
        budget = min(limits.tokens, max(limits.batch_tokens, min(share, BATCHES_PER_REQUEST * limits.batch_tokens)))
        return neighbours(rows, _length, most_rows=limits.rows, most_tokens=budget)

    def _question(self, rows: Sequence[Row], kind: TargetKind) -> Question[list[dict[str, Tensor]]]:
        """The tensors of every row."""
        if kind in ("hidden", "dense"):
            path, body = "/v1/hidden", {"rows": rows, "dtype": self.wire}
            widths = {"hidden": (self.served.hidden_size,)}
        else:
            k = self.top_k if kind == "top_k" else 1
            common = {"vocabulary": self.vocabulary.size, "masked_ids": list(self.vocabulary.invalid_ids)}
            path, body = "/v1/score", {"rows": rows, "top_k": k, **common}
            widths = {"ids": (k,), "logp": (k,), "sampled_logp": ()}
        return Question(request=Request(path=path, json=body), read=lambda answer: self._read(answer, rows, widths))

    def _read(
        self, answer: Answer, rows: Sequence[Row], widths: Mapping[str, tuple[int, ...]]
    ) -> list[dict[str, Tensor]]:
        """An answer's rows, once it is certain that they are those that were asked for. Raises BadAnswer, or ServerError for another
        model's."""
        try:
            tensors, receipts, identity = read_answer(answer.content)
        except ValueError as error:
            raise BadAnswer(str(error)) from None
        self.served.check_identity(identity, answer.server, self.pool.section)
        expected = [
            Receipt(id=row["id"], digest=digest_of(row["prompt"], row["response"]), tokens=len(row["response"]))
            for row in rows
        ]
        if receipts != expected:
            wrong = sum(one != other for one, other in itertools.zip_longest(receipts, expected))
            raise BadAnswer(f"an answer about other rows than those that were asked for ({wrong} of {len(expected)})")
        total = sum(receipt.tokens for receipt in receipts)
        for name, width in widths.items():
            if name not in tensors or tuple(tensors[name].shape) != (total, *width):
                raise BadAnswer(f"{name} of another shape than {[total, *width]}")
            if bool(tensors[name].isnan().any()):
                raise BadAnswer(f"NaN in {name}")
        parts = {name: tensors[name].split([receipt.tokens for receipt in receipts]) for name in widths}
        return [dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)]

    def _targets(self, rows: Sequence[dict[str, Tensor]], kind: TargetKind) -> list[Target]:
        if kind in ("hidden", "dense"):
            head = self.head
            assert head is not None
            own = [row["hidden"].to(head.weight.device, head.weight.dtype) for row in rows]
            hidden = [HiddenTarget(hidden=states, head=head) for states in own]
            return list(hidden) if kind == "hidden" else [DenseTarget(logits=self.logits(one)) for one in hidden]
        placed = [{name: tensor.to(self.device) for name, tensor in row.items()} for row in rows]
        if kind == "sampled":
            return [SampledTarget(teacher_logp=row["sampled_logp"]) for row in placed]
        return [
            TopKTarget(ids=row["ids"].long(), teacher_logp=row["logp"], sampled_logp=row["sampled_logp"])
            for row in placed
        ]

    def _read_head(self, answer: Answer) -> dict[str, Tensor]:
        try:
            parts, facts = load(answer.content), read_metadata(answer.content)
        except SafetensorError as error:
            raise BadAnswer(f"an output layer that is cut off or damaged ({error})") from None
        self.served.check_identity(facts.get("identity", ""), answer.server, self.pool.section)
        if tensors_digest(parts) != self.served.head_fingerprint:
            raise BadAnswer("an output layer whose bytes are not those that it announced")
        return parts

    def _check_context(self, rows: Sequence[Row], rollouts: Sequence[Rollout]) -> None:
        limit = self.served.limits.row_tokens
        for row, rollout in zip(rows, rollouts, strict=True):
            if _length(row) > limit:
                raise DataError(
                    f"Prompt {rollout.prompt.index} and its response take {_length(row)} tokens, and the server of {self.name} reads "
                    f"{limit}. Lower rollout.max_new_tokens, drop the long prompts, or, where the model reads more, start the server "
                    f"with --max-tokens {_length(row)}."
                )


def _length(row: Row) -> int:
    """Tokens that the model reads."""
    return len(row["prompt"]) + len(row["response"]) - 1

"""A teacher in this process: any Hugging Face causal LM, frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from opd.data.pack import Layout, group_by_length, layout_sequences
from opd.data.rendering import Renderer
from opd.errors import ConfigError, DataError, ObjectiveError
from opd.kernels import linear_logits, linear_top_k, top_k_of
from opd.losses import DEFAULT_TOP_K, Objective, to_logp
from opd.models import context_length, linear_head, output_layer, response_hidden, response_logits
from opd.teachers.fingerprint import model_fingerprint
from opd.teachers.vocabulary import VocabularyMatch, embedding_rows
from opd.types import (
    DenseTarget,
    Head,
    HiddenTarget,
    Prompt,
    Rollout,
    SampledTarget,
    Sequences,
    Target,
    TargetKind,
    TopKTarget,
)


class LocalTeacher:
    """Reads its own rendering of the prompt, then the student's response tokens as they are.

    With the student's layout and batch size its forward pass is the student's own, operation by operation, so a teacher that
    *is* the student differs from it by exactly nothing. Logits are cut to the common vocabulary, and ids that no token owns are −inf,
    exactly as on the student's side.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        renderer: Renderer,
        *,
        vocabulary: VocabularyMatch,
        pad_id: int,
        name: str = "teacher",
        tokens_per_batch: int = 16384,
        layout: Layout = "right_padded",
        supply: TargetKind | None = None,
        model_context: Callable[[], AbstractContextManager[None]] = nullcontext,
        frozen: bool = True,
    ) -> None:
        """`model_context` is entered around every use of the model: it moves an offloaded one to its device, or disables an adapter.
        `frozen=False` leaves the weights trainable, for a model that is trained elsewhere."""
        self.model = model.requires_grad_(False).eval() if frozen else model
        self.frozen = frozen
        self._model_context = model_context
        self._depth = 0
        self.renderer = renderer
        self.name = name
        self.vocabulary = vocabulary
        self.pad_id = pad_id
        self.tokens_per_batch = tokens_per_batch
        self.layout: Layout = layout
        self.rows = embedding_rows(model)
        """Ids that it can read. A sampler of somebody's own may draw rows that pad the student's output layer."""
        self._head = linear_head(model)
        self._head_of = None if self._head is None else output_layer(model).weight
        possible: set[TargetKind] = {"dense", "top_k", "sampled"}
        if self._head is not None:
            possible.add("hidden")
        if supply is not None and supply not in possible:
            raise ObjectiveError(
                f"teacher.supply is '{supply}', but {type(model).__name__} does more than a matrix product after its last hidden "
                f"state (a soft-cap or a scale), so hidden states alone do not give its logits. Use supply=auto or dense."
            )
        self.supplies: frozenset[TargetKind] = frozenset(possible if supply is None else {supply})
        self.exact_kind: TargetKind = "hidden" if self._head is not None else "dense"
        """The whole distribution, for evaluation, whatever the objective trains on."""
        self.kind: TargetKind = supply or self.exact_kind
        self.top_k = 0

    @property
    def head(self) -> Head | None:
        """The output layer; None where logits are more than a product with it. Of a model whose weights are divided over ranks it is
        whole after a forward pass."""
        if self._head is None:
            return None
        layer = output_layer(self.model)
        if layer.weight is not self._head_of:
            self._head_of = layer.weight
            self._head = Head(weight=layer.weight.detach(), bias=None if layer.bias is None else layer.bias.detach())
        return self._head

    def bind_objective(self, objective: Objective) -> TargetKind:
        """Settle what `score` hands out for this objective. Raises ObjectiveError when nothing it supplies will do."""
        self.kind = objective.check_supplies(self.supplies, self.name)
        self.top_k = min(objective.top_k or DEFAULT_TOP_K, self.vocabulary.size)
        return self.kind

    @cached_property
    def fingerprint(self) -> str:
        """A hash of its weights, dtype and config: the same answers to the same ids. Raises ConfigError where the weights are trained."""
        if not self.frozen and not hasattr(self.model, "disable_adapter"):
            raise ConfigError(
                f"The weights of {self.name} are trained, so what it says cannot be kept; drop teacher.cache."
            )
        return model_fingerprint(self.model, adapter_off=not self.frozen)

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt as it reads it."""
        return self.renderer.prompt_ids(prompt)

    def groups(self, rollouts: Sequence[Rollout]) -> dict[str, list[int]]:
        """All rollouts may share a micro-batch."""
        return {"": list(range(len(rollouts)))}

    @contextmanager
    def context(self) -> Iterator[None]:
        """The model is ready to be used inside; blocks may be nested."""
        if self._depth:
            yield
            return
        with self._model_context():
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    def score(self, rollouts: Sequence[Rollout], kind: TargetKind | None = None) -> list[Target]:
        """One target per rollout, in order; row t is the teacher's view of response token t. `kind` is what `bind_objective` settled
        unless another is asked for. Raises DataError when a prompt and its response do not fit the teacher's context."""
        with torch.no_grad(), self.context():
            return self._score(rollouts, kind or self.kind)

    def _score(self, rollouts: Sequence[Rollout], kind: TargetKind) -> list[Target]:
        prompts = [self.renderer.prompt_ids(r.prompt) for r in rollouts]
        self._check_context(prompts, rollouts)
        lengths = [len(p) + len(r.response_ids) - 1 for p, r in zip(prompts, rollouts, strict=True)]
        targets: dict[int, Target] = {}
        for members in group_by_length(lengths, budget=self.tokens_per_batch, layout=self.layout):
            sequences = layout_sequences(
                [prompts[i] for i in members],
                [[t if t < self.rows else 0 for t in rollouts[i].response_ids] for i in members],
                layout=self.layout,
                pad_id=self.pad_id,
                device=self.model.device,
            )
            ids = torch.tensor([t for i in members for t in rollouts[i].response_ids], device=self.model.device)
            ids = self.vocabulary.with_stand_ins(ids)
            sizes = [len(rollouts[i].response_ids) for i in members]
            targets |= zip(members, self._targets(kind, sequences, ids, sizes), strict=True)
        return [targets[i] for i in range(len(rollouts))]

    def _targets(self, kind: TargetKind, sequences: Sequences, ids: torch.Tensor, sizes: list[int]) -> list[Target]:
        if kind == "hidden":
            hidden = self._hidden(sequences)
            head = self.head
            assert head is not None
            return [HiddenTarget(hidden=h, head=head) for h in hidden.split(sizes)]
        if kind == "dense":
            return [DenseTarget(logits=rows) for rows in self._logits(sequences).split(sizes)]
        top = self._top_k(sequences, ids, self.top_k if kind == "top_k" else 1)
        assert top.sampled_logp is not None
        sampled = top.sampled_logp.split(sizes)
        if kind == "sampled":
            return [SampledTarget(teacher_logp=rows) for rows in sampled]
        parts = zip(top.ids.split(sizes), top.teacher_logp.split(sizes), sampled, strict=True)
        return [TopKTarget(ids=i, teacher_logp=v, sampled_logp=s) for i, v, s in parts]

    def _logits(self, sequences: Sequences) -> torch.Tensor:
        if self._head is None:
            return mask_vocabulary(response_logits(self.model, sequences), self.vocabulary)
        hidden = self._hidden(sequences)
        assert self.head is not None
        return linear_logits(hidden, self.head, **_common(self.vocabulary))

    def _top_k(self, sequences: Sequences, ids: torch.Tensor, k: int) -> TopKTarget:
        if self._head is None:
            return top_k_of(to_logp(self._logits(sequences)), ids, k)
        hidden = self._hidden(sequences)
        assert self.head is not None
        return linear_top_k(hidden, self.head, ids, k, **_common(self.vocabulary))

    def _hidden(self, sequences: Sequences) -> torch.Tensor:
        return response_hidden(self.model, sequences).to(output_layer(self.model).weight.dtype)

    def logits(self, target: HiddenTarget) -> torch.Tensor:
        """Teacher logits of a hidden target, in float32 and masked like the dense ones."""
        return linear_logits(target.hidden, target.head, **_common(self.vocabulary))

    def _check_context(self, prompts: Sequence[tuple[int, ...]], rollouts: Sequence[Rollout]) -> None:
        limit = context_length(self.model)
        for prompt, rollout in zip(prompts, rollouts, strict=True):
            length = len(prompt) + len(rollout.response_ids) - 1
            if limit is not None and length > limit:
                raise DataError(
                    f"Prompt {rollout.prompt.index} and its response take {length} tokens, and {self.name} reads {limit}. "
                    "Lower rollout.max_new_tokens, or drop the long prompts."
                )


def _common(vocabulary: VocabularyMatch) -> dict[str, Any]:
    return {"valid_vocab": vocabulary.size, "masked_ids": vocabulary.invalid_ids}


@torch.no_grad()
def sampled_logp(target: HiddenTarget | DenseTarget, ids: torch.Tensor, vocabulary: VocabularyMatch) -> torch.Tensor:
    """A whole distribution's log-prob (nats) of one token per row, on the device of `ids`."""
    if isinstance(target, DenseTarget):
        return to_logp(target.logits).gather(-1, ids.to(target.logits.device).unsqueeze(-1)).squeeze(-1).to(ids.device)
    top = linear_top_k(target.hidden, target.head, ids.to(target.hidden.device), 1, **_common(vocabulary))
    assert top.sampled_logp is not None
    return top.sampled_logp.to(ids.device)


def mask_vocabulary(logits: torch.Tensor, vocabulary: VocabularyMatch) -> torch.Tensor:
    """Padding rows cut off, ids that no token owns at −inf. Both sides of the loss go through here."""
    logits = logits[..., : vocabulary.size]
    if vocabulary.invalid_ids:
        invalid = torch.tensor(vocabulary.invalid_ids, device=logits.device)
        logits = logits.index_fill(-1, invalid, float("-inf"))
    return logits


@contextmanager
def on_device_meanwhile(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """The model on its device inside, and in CPU memory outside."""
    model.to(device)  # pyright: ignore[reportArgumentType]  # transformers wraps nn.Module.to
    try:
        yield
    finally:
        model.to("cpu")  # pyright: ignore[reportArgumentType]

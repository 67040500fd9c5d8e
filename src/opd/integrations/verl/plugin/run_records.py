"""The run folder of `opd.run_dir`: metrics of every step, and some responses with what both models said at each token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opd.data.rendering import Renderer
from opd.integrations.verl.plugin.alignment import ResponseTokens, padded
from opd.integrations.verl.plugin.settings import Settings
from opd.integrations.verl.plugin.teachers import TargetSlice
from opd.kernels import linear_views
from opd.kernels.spec import select_target
from opd.kernels.views import by_sequence
from opd.reporting.details import token_details
from opd.reporting.record import RunRecorder, SampleRecord
from opd.teachers.vocabulary import VocabularyMatch
from opd.types import TokenViews


class RunWriter:
    """Writes the metrics of each step's first update, and the first responses that this rank reads in it; one rank has one.

    The first update is the one whose responses were drawn from the weights that it moves.
    """

    def __init__(self, settings: Settings, tokenizer: Any, eos_ids: Sequence[int]) -> None:
        assert settings.run_dir is not None
        self.folder = Path(settings.run_dir)
        self.every, self.count = settings.log.samples_every, settings.log.samples
        self.teacher_temperature = settings.objective.teacher_temperature
        self.renderer, self.eos_ids = Renderer(tokenizer, name="student"), frozenset(eos_ids)
        self.step, self.first = -1, False
        """verl's step, from 0, and whether the update at hand is its first."""
        self.left = 0
        """Responses that are still wanted in this step."""
        self.chosen: list[int] = []
        """Sequences of the micro-batch at hand."""
        self.seen: dict[int, tuple[TokenViews, str]] = {}
        """By sequence, the views of its tokens and the name of its teacher."""
        self._recorder: RunRecorder | None = None

    def begin(self, step: int) -> None:
        """Called before each update of verl's step `step`, from 0."""
        self.step, self.first = step, step != self.step
        self.left = self.count if self.first and step % self.every == 0 else 0

    def end(self, metrics: Mapping[str, float]) -> None:
        """Called after each update, with its means over all ranks. Raises RunFolderError."""
        if self.first:
            self._open().step(self.step, metrics)

    def choose(self, micro_batch: Any, tokens: ResponseTokens) -> None:
        """Take the first sequences of a micro-batch whose response tokens are all this rank's; others are in the slice of another."""
        self.chosen, self.seen = [], {}
        if not self.left:
            return
        lengths = padded(micro_batch, "response_mask").bool().sum(-1)
        here = torch.bincount(tokens.sequence_index, minlength=len(lengths))
        whole = ((here == lengths) & (lengths > 0)).nonzero().squeeze(-1)
        self.chosen = whole[: self.left].tolist()

    def look(
        self, hidden: Tensor, layer: nn.Linear, part: TargetSlice, tokens: ResponseTokens, vocabulary: VocabularyMatch
    ) -> None:
        """Take the views of the chosen sequences' tokens; `hidden` and `tokens` are those of the slice."""
        if not self.chosen:
            return
        wanted = torch.tensor(self.chosen, device=tokens.sequence_index.device)
        rows = torch.isin(tokens.sequence_index, wanted).nonzero().squeeze(-1)
        if not len(rows):
            return
        views = linear_views(
            hidden[rows],
            layer.weight,
            select_target(part.target, rows),
            vocabulary.with_stand_ins(tokens.ids[rows]),
            bias=layer.bias,
            valid_vocab=vocabulary.size,
            masked_ids=vocabulary.invalid_ids,
            teacher_temperature=self.teacher_temperature,
        )
        found = by_sequence(views, tokens.position[rows], tokens.sequence_index[rows])
        self.seen |= {sequence: (one, part.name) for sequence, one in found.items()}

    def write(
        self, input_ids: Tensor, tokens: ResponseTokens, taught: ResponseTokens, reverse_kl: Tensor | None
    ) -> None:
        """Write the chosen sequences. `reverse_kl` is that of the taught tokens. Raises RunFolderError."""
        for sequence in self.chosen:
            if sequence in self.seen:
                recorder = self._open()
                recorder.sample(self._sample(sequence, input_ids, tokens, taught, reverse_kl))
                self.left -= 1
        self.chosen, self.seen = [], {}

    def _open(self) -> RunRecorder:
        """The records of a new run, or of one that verl goes on with: lines of this step and of later ones are written again."""
        if self._recorder is None:
            self._recorder = RunRecorder(self.folder, resume_step=self.step or None)
        return self._recorder

    def _sample(
        self,
        sequence: int,
        input_ids: Any,
        tokens: ResponseTokens,
        taught: ResponseTokens,
        reverse_kl: Tensor | None,
    ) -> SampleRecord:
        views, teacher = self.seen[sequence]
        own = tokens.at((tokens.sequence_index == sequence).nonzero().squeeze(-1))
        begin, end = input_ids.offsets()[sequence : sequence + 2].tolist()
        # A token is at the position after the one that predicts it.
        first = int(own.packed_index[0] - own.position[0]) + 1
        values = input_ids.values()
        prompt, response = values[begin:first].tolist(), values[first:end].tolist()
        kl = None if reverse_kl is None else reverse_kl[taught.sequence_index == sequence].tolist()
        sampler_logp = None
        if own.sampler_logp is not None:
            sampler_logp = [math.nan] * len(response)
            for place, value in zip(own.position.tolist(), own.sampler_logp.tolist(), strict=True):
                sampler_logp[place] = value
        renderer = self.renderer
        text, special = renderer.with_special(prompt)
        return SampleRecord(
            step=self.step,
            phase="train",
            who="student",
            prompt=text,
            special=special,
            response=renderer.decode(response),
            tokens=renderer.token_strings(response),
            joined=renderer.joined_tokens(response),
            reverse_kl=kl if kl and len(kl) == len(response) else None,
            finished=response[-1] in self.eos_ids,
            teacher=teacher or None,
            details=token_details(views, len(response), sampler_logp, renderer.token_strings),
        )

"""Answers of any model, drawn as a run draws its rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from opd.config.run import RunSettings
from opd.data.rendering import Renderer
from opd.models import vocabulary_rows
from opd.reporting.loading import Loading
from opd.samplers.base import Sampling, draw
from opd.samplers.hf import HfSampler
from opd.teachers.vocabulary import check_vocabularies
from opd.trainer.guardrails import memory_advice
from opd.trainer.load_models import LoadedModel
from opd.trainer.load_trained import load_trained
from opd.types import Prompt, Rollout

UNFINISHED = "�"  # what decoders put for the first bytes of a character


class Asked:
    """A loaded model that answers prompts."""

    def __init__(self, settings: RunSettings, checkpoint: Path | None, sampling: Sampling, loading: Loading) -> None:
        """Raises OpdError for a model that cannot be loaded."""
        self.loaded = load_trained(settings, checkpoint, loading)
        self.sampler = _sampler(self.loaded, settings, sampling)

    @property
    def renderer(self) -> Renderer:
        return self.loaded.renderer

    @property
    def chats(self) -> bool:
        """The tokenizer has a chat template."""
        return bool(self.loaded.tokenizer.chat_template)

    def answer(
        self, prompts: Sequence[Prompt], count: int, *, seed: int, tell: Callable[[str], object] | None = None
    ) -> list[Rollout]:
        """`count` answers to each prompt, in order. `tell` is handed the text of a single answer as it grows, piece by piece."""
        pieces = self.sampler.watch = None if tell is None else _Pieces(self.renderer, tell)
        with memory_advice("rollout"):
            rollouts = draw(self.sampler, prompts, count, seed=seed)
        if pieces is not None:
            pieces.finish(rollouts[0].text)
        return rollouts


class _Pieces:
    """Tells what is new in the text of an answer; characters are whole."""

    def __init__(self, renderer: Renderer, tell: Callable[[str], object]) -> None:
        self._renderer = renderer
        self._tell = tell
        self._told = 0

    def __call__(self, rows: Sequence[Sequence[int]]) -> None:
        text = self._renderer.decode(rows[0]).rstrip(UNFINISHED)
        if len(text) > self._told:
            self._tell(text[self._told :])
            self._told = len(text)

    def finish(self, text: str) -> None:
        """Tell the rest of the whole answer: an end that is no whole character was kept back."""
        self._tell(text[self._told :])


def _sampler(loaded: LoadedModel, settings: RunSettings, sampling: Sampling) -> HfSampler:
    rows, name = vocabulary_rows(loaded.model), settings.student.model
    vocabulary = check_vocabularies(
        loaded.tokenizer,
        loaded.tokenizer,
        rows,
        rows,
        student_name=name,
        teacher_name=name,
        student_eos=loaded.eos,
        teacher_eos=loaded.eos,
    )
    return HfSampler(
        loaded.model,
        loaded.renderer,
        sampling,
        eos_ids=loaded.eos,
        pad_id=loaded.pad_id,
        vocabulary=vocabulary,
        batch_size=settings.rollout.batch_size,
    )

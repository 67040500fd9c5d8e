"""The metric start_kl: how far a student has moved from what it was before training, on a few answers of its first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd.data.pack import pack
from opd.errors import RunFolderError
from opd.trainer.from_config import RunComponents
from opd.types import Batch, Prompt, Rollout

ANSWERS = 4
TOKENS = 64  # of each
EVERY = 10  # steps
TOP = 256  # likeliest tokens of the start that are kept at each token; 512 KiB for all of them
FILE = "start_kl.safetensors"


class Measured(Protocol):
    """The student, as far as this asks it."""

    version: int

    def logits(self, batch: Batch) -> Tensor:
        """Logits [tokens, vocabulary] of a batch."""
        ...


class Packs(Protocol):
    """Lays answers out as the run does."""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Batch]: ...


class StartKl:
    """Keeps the start's likeliest tokens on a few answers, in the CPU's memory and in the run's folder, and compares the student with them.

    It draws nothing and trains nothing, so that a run with it has the same numbers as one without.
    """

    def __init__(self, pack: Packs, folder: Path | None) -> None:
        """`folder` keeps the start for a run that is resumed; None keeps it in memory alone."""
        self._pack = pack
        self._file = None if folder is None else folder / FILE
        self._start: tuple[list[Rollout], Tensor, Tensor] | None = None

    @torch.no_grad()
    def measure(self, student: Measured, rollouts: Sequence[Rollout]) -> float | None:
        """KL(student ‖ start) in nats per token, of the weights as they are now. None where it is not time to look, or where nothing is
        known of the start, because the run began without this rule."""
        if student.version % EVERY:
            return None
        if self._start is None:
            self._start = self._keep(student, rollouts) if student.version == 0 else self._read()
        if self._start is None:
            return None
        answers, ids, logp = self._start
        return float(kl_to_top(self._rows(student, answers), ids, logp).mean())

    def _rows(self, student: Measured, answers: Sequence[Rollout]) -> Tensor:
        """Log-probs [tokens, vocabulary] at every token of the answers, in their order."""
        found: dict[int, Tensor] = {}
        for batch in self._pack(answers):
            values = student.logits(batch).float().log_softmax(-1).cpu()
            sizes = [len(one.response_ids) for one in batch.rollouts]
            found |= {one.id: part for one, part in zip(batch.rollouts, values.split(sizes), strict=True)}
        return torch.cat([found[one.id] for one in answers])

    def _keep(self, student: Measured, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], Tensor, Tensor] | None:
        own = [one for one in rollouts if one.source == "student" and one.response_ids]
        answers = [_bare(one.prompt_ids, one.response_ids[:TOKENS], place) for place, one in enumerate(own[:ANSWERS])]
        if not answers:
            return None
        rows = self._rows(student, answers)
        logp, ids = rows.topk(min(TOP, rows.shape[-1]), dim=-1)
        if self._file is not None:
            self._write(answers, ids, logp)
        return answers, ids, logp

    def _write(self, answers: Sequence[Rollout], ids: Tensor, logp: Tensor) -> None:
        assert self._file is not None
        tensors = {"ids": ids.int(), "logp": logp}
        for one in answers:
            tensors |= {
                f"prompt {one.id}": torch.tensor(one.prompt_ids),
                f"answer {one.id}": torch.tensor(one.response_ids),
            }
        try:
            save_file(tensors, self._file)
        except (OSError, SafetensorError) as error:
            raise RunFolderError(
                f"'{self._file}' cannot be written: {error}. Free some space, or set guard.start_kl.action=off."
            ) from error

    def _read(self) -> tuple[list[Rollout], Tensor, Tensor] | None:
        if self._file is None or not self._file.exists():
            return None
        try:
            found = load_file(self._file)
        except (OSError, SafetensorError) as error:
            raise RunFolderError(
                f"'{self._file}' cannot be read: {error}. Delete it: the run goes on without the metric start_kl."
            ) from error
        count = sum(name.startswith("prompt ") for name in found)
        answers = [
            _bare(tuple(found[f"prompt {i}"].tolist()), tuple(found[f"answer {i}"].tolist()), i) for i in range(count)
        ]
        return answers, found["ids"].long(), found["logp"]


def start_kl_of(components: RunComponents, folder: Path) -> StartKl | None:
    """The measure of a run; None where guard.start_kl is off."""
    config = components.config
    if config.guard.start_kl.action == "off":
        return None
    train = config.train

    def laid_out(rollouts: Sequence[Rollout]) -> list[Batch]:
        return pack(
            rollouts,
            None,
            layout=train.layout,
            tokens_per_microbatch=train.microbatch,
            pad_id=components.pad_id,
            device=components.student.device,
        )

    return StartKl(laid_out, folder)


def kl_to_top(student_logp: Tensor, ids: Tensor, start_logp: Tensor) -> Tensor:
    """KL(student ‖ start) [tokens] in nats, with all tokens beyond the start's likeliest `ids` [tokens, k] counted as one. That is at
    most the KL over the whole vocabulary, and equal to it where k is the vocabulary."""
    mine = student_logp.gather(-1, ids)
    kept = (mine.exp() * (mine - start_logp)).nan_to_num(0.0).sum(-1)  # a token of no probability adds nothing
    if ids.shape[-1] == student_logp.shape[-1]:
        return kept
    tiny = torch.finfo(torch.float32).tiny
    rest, start_rest = ((1 - side.exp().sum(-1)).clamp(min=tiny) for side in (mine, start_logp))
    return kept + rest * (rest / start_rest.clamp(min=1e-6)).log()


def _bare(prompt_ids: tuple[int, ...], response_ids: tuple[int, ...], place: int) -> Rollout:
    """An answer of which only the ids matter."""
    rollout = Rollout(
        prompt=Prompt(index=place, text=""),
        prompt_ids=prompt_ids,
        response_ids=response_ids,
        sampler_logp=None,
        finished=False,
        policy_version=0,
    )
    return replace(rollout, id=place, group=place)

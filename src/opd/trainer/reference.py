"""The student before training, from which a reinforced one is kept near: rl.reference_kl."""

from __future__ import annotations

import copy
from contextlib import nullcontext

from transformers import PreTrainedModel

from opd.config import Config
from opd.data.rendering import Renderer
from opd.teachers.local import LocalTeacher
from opd.teachers.vocabulary import VocabularyMatch


def frozen_copy(config: Config, model: PreTrainedModel) -> PreTrainedModel | None:
    """A copy of the first weights; a resumed run loads its own over the student's later. None where no update compares with them, and
    where adapters can be taken off instead."""
    wanted = config.rl.rewarded and config.rl.reference_kl > 0 and config.student.lora is None
    return copy.deepcopy(model).requires_grad_(False) if wanted else None


def reference_teacher(
    config: Config,
    model: PreTrainedModel,
    kept: PreTrainedModel | None,
    renderer: Renderer,
    vocabulary: VocabularyMatch,
    pad_id: int,
) -> LocalTeacher | None:
    """The reference as a teacher: the `kept` copy, or the student `model` without its adapters. None where rl.reference_kl is 0."""
    if config.rl.reference_kl == 0:
        return None
    return LocalTeacher(
        model if kept is None else kept,
        renderer,
        frozen=kept is not None,
        model_context=model.disable_adapter if kept is None else nullcontext,  # pyright: ignore[reportArgumentType]  # of a peft model
        vocabulary=vocabulary,
        pad_id=pad_id,
        name="the reference",
        tokens_per_batch=config.train.microbatch,
        layout=config.train.layout,
    )

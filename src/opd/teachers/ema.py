"""A teacher that follows the student: the exponential moving average of its weights."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from opd.errors import ConfigError


class Ema:
    """average ← decay · average + (1 − decay) · student, after every update. Weights that do not train are shared, not copied."""

    def __init__(self, student: PreTrainedModel, decay: float) -> None:
        """Starts as the student is. Raises ConfigError for trained weights in 16 bits, in which small steps would round to none."""
        coarse = next((p.dtype for p in student.parameters() if p.requires_grad and p.dtype.itemsize < 4), None)
        if coarse is not None:
            raise ConfigError(
                f"teacher.source=ema averages the trained weights, and in {coarse} steps of 1 − teacher.ema_decay would round to none. "
                "Use student.dtype=float32 with train.autocast=bfloat16."
            )
        self.student = student
        self.decay = decay
        shared = {id(p): p for p in student.parameters() if not p.requires_grad}
        self.trained = [name for name, p in student.named_parameters() if p.requires_grad]
        self.model: PreTrainedModel = copy.deepcopy(student, shared)
        self.model.requires_grad_(False)

    @torch.no_grad()
    def update(self) -> None:
        """One step towards the student."""
        now = dict(self.student.named_parameters())
        for name, average in self.weights().items():
            average.lerp_(now[name], 1.0 - self.decay)

    def weights(self) -> dict[str, torch.Tensor]:
        """The averages, by the student's names."""
        averages = dict(self.model.named_parameters())
        return {name: averages[name] for name in self.trained}

"""Sections of the optimizer."""

from __future__ import annotations

import math
import re
from dataclasses import field
from typing import Literal

from opd.config.rules import at_least, not_negative, positive
from opd.config.sections import Section
from opd.errors import ConfigError, require

DEFAULT_LR = 1e-5  # of AdamW, and of Muon's matrices
DEFAULT_WARMUP_STEPS = 10
DEFAULT_MAX_GRAD_NORM = 1.0


class NaturalGradientConfig(Section, key="optimizer.natural_gradient"):
    """(F + damping·I) x = −g by conjugate gradients, F the Fisher matrix of the student's next-token distributions on the step's
    rollouts. For exact divergences, and for small students, adapters or last layers: a step costs several AdamW updates, holds whole
    logits and needs more memory (optim/natural_gradient.py says how much)."""

    damping: float = 0.01
    """Added to F: more makes the step shorter, and more like the plain gradient."""
    trust_region: float = 0.1
    """Nats per token that the student may move in one step, by the second-order estimate ½ xᵀFx; a longer step is cut back to it."""
    iterations: int = 10
    """Of conjugate gradients; each costs one product with F."""
    probes: int = 0
    """Random gradients, a backward pass each, that make a Kronecker-factored preconditioner of the solver; 0 is none. Where
    a step has many more tokens than the Fisher matrix has large eigenvalues, 4 of them and 10 iterations did what 20 to 30 do without;
    with few tokens they can slow it down (benchmarks/LOG.md). Memory: as many vectors of the size of the trained parameters."""
    keep_graphs: bool = True
    """Keep the autograd graphs of all micro-batches during the solve; false makes them again for every product: 1.4 to 1.6 times the
    time, and the memory of one micro-batch."""
    parameters: str | None = None
    """Regular expression searched in the names of the trainable parameters: train those alone, e.g. 'layers\\.(26|27)\\.|^model.norm'
    (a name like model.layers.27.mlp.up_proj.weight). None trains all, or all adapters."""

    def __post_init__(self) -> None:
        ok = math.isfinite(self.damping) and self.damping >= 0
        require(ok, f"optimizer.natural_gradient.damping must be a positive number, not {self.damping}")
        positive(self, "trust_region")
        at_least(1, self, "iterations")
        require(self.probes >= 0, f"optimizer.natural_gradient.probes must be 0 (none) or more, not {self.probes}")
        if self.parameters is not None:
            try:
                re.compile(self.parameters)
            except re.error as error:
                raise ConfigError(
                    f"optimizer.natural_gradient.parameters='{self.parameters}' is not a regular expression: {error}."
                ) from error


class OptimizerConfig(Section, key="optimizer"):
    """Optimizer, learning rate and clipping."""

    name: Literal["adamw", "muon", "natural_gradient"] = "adamw"
    """AdamW; Muon for the hidden matrices with AdamW for embeddings, head, norms and biases; or natural-gradient steps."""
    lr: float | None = None
    """Peak learning rate of AdamW, or of Muon's matrices; None is 1e-5. With natural_gradient a factor of its step, up to 1, which
    None is: the trust region says how far it goes."""
    adamw_lr: float | None = None
    """With muon: the learning rate of what AdamW keeps; None is lr / 6."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decays."""
    weight_decay: float = 0.0
    """Decoupled weight decay: matrices lose lr · weight_decay of themselves per step, whatever the optimizer."""
    momentum: float = 0.95
    """Muon's momentum."""
    offload: bool = False
    """Keep the moments in CPU memory but for the optimizer's step: slower, and their room on the device is the activations' and the
    rollouts' meanwhile."""
    natural_gradient: NaturalGradientConfig = field(default_factory=NaturalGradientConfig)
    """With natural_gradient: its solver."""
    warmup_steps: int | None = None
    """Linear warm-up; None is a tenth of train.steps but 10 at most, and none with natural_gradient. Without one the first Adam steps
    can wreck a small model."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up."""
    min_lr_ratio: float = 0.0
    """End of linear and cosine, as a share of lr."""
    max_grad_norm: float | None = None
    """Gradients are clipped to this global norm; 0 switches clipping off. None is 1, and off with natural_gradient, whose trust region
    bounds the step."""

    def __post_init__(self) -> None:
        positive(self, "lr", "adamw_lr")
        require(all(0 <= b < 1 for b in self.betas), f"optimizer.betas must lie in [0, 1), not {self.betas}")
        require(0 <= self.momentum < 1, f"optimizer.momentum must lie in [0, 1), not {self.momentum}")
        not_negative(self, "weight_decay", "warmup_steps")
        require(0 <= self.min_lr_ratio <= 1, f"optimizer.min_lr_ratio must lie in [0, 1], not {self.min_lr_ratio}")
        require(
            self.max_grad_norm is None or self.max_grad_norm >= 0,
            f"optimizer.max_grad_norm must be 0 (off) or positive, not {self.max_grad_norm}",
        )
        self._check_natural_gradient()
        # What warmup_steps=None stands for depends on the length of the run, so the whole Config fills that in.
        self._fill_in(lr=self.peak_lr, max_grad_norm=self.gradient_limit)

    def _check_natural_gradient(self) -> None:
        require(
            not (self.offload and self.name == "natural_gradient"),
            "optimizer.offload moves moments, and optimizer.name=natural_gradient has none. Drop it.",
        )
        if self.name != "natural_gradient":
            require(
                self.natural_gradient == NaturalGradientConfig(),
                f"optimizer.natural_gradient is read with optimizer.name=natural_gradient, and it is {self.name}; set that, or drop the "
                "section.",
            )
            return
        require(
            self.peak_lr <= 1,
            f"optimizer.lr={self.lr} would take natural_gradient out of its trust region: there lr is a factor of the step, at most 1. "
            "Raise optimizer.natural_gradient.trust_region instead.",
        )
        require(
            not self.max_grad_norm,
            f"optimizer.max_grad_norm={self.max_grad_norm} would shorten the gradient before natural_gradient solves for its step, whose "
            "length the trust region bounds; set it to 0, or drop it.",
        )

    @property
    def peak_lr(self) -> float:
        """`lr`, or the optimizer's own default."""
        if self.lr is not None:
            return self.lr
        return 1.0 if self.name == "natural_gradient" else DEFAULT_LR

    @property
    def warmup(self) -> int:
        """Steps of warm-up in a long run."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return 0 if self.name == "natural_gradient" else DEFAULT_WARMUP_STEPS

    def warmup_within(self, total_steps: int) -> int:
        """Steps of warm-up in a run of `total_steps`."""
        return default_warmup(self.name, total_steps) if self.warmup_steps is None else self.warmup_steps

    @property
    def gradient_limit(self) -> float:
        """The norm that gradients are clipped to; 0 does not clip."""
        if self.max_grad_norm is not None:
            return self.max_grad_norm
        return 0.0 if self.name == "natural_gradient" else DEFAULT_MAX_GRAD_NORM


def default_warmup(name: str, total_steps: int) -> int:
    """Steps of warm-up when the recipe does not say: a tenth of the run, so that a short one reaches its rate too."""
    return 0 if name == "natural_gradient" else min(DEFAULT_WARMUP_STEPS, math.ceil((total_steps - 1) / 10))

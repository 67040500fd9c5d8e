"""Sections of the teachers, and of how several make one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import ClassVar, Literal

from opd.config.model import DType, ModelConfig
from opd.config.rules import at_least, check_names, check_weights
from opd.config.sections import Section
from opd.errors import require
from opd.losses import linear_schedule


class TeacherConfig(ModelConfig, key="teacher"):
    """The frozen model that scores the student's samples, in this process. It has the student's vocabulary."""

    model: str = ""
    """Local folder or hub name of a causal language model; not read where `source` is the student itself."""
    source: Literal["model", "adapter_off", "ema", "student"] = "model"
    """Self-distillation: the student without its adapter, the moving average of its weights, or the student as it is at every step,
    each of them best with prompts.teacher_prompt, which shows the teacher more than the student sees."""
    ema_decay: float = 0.99
    """source=ema: average ← ema_decay · average + (1 − ema_decay) · student after every step."""
    dtype: DType = "auto"
    """'auto' is bfloat16 on CUDA and float32 on CPU."""
    tokens_per_batch: int = 16384
    """Tokens the teacher reads at once (padding included)."""
    supply: Literal["auto", "hidden", "dense", "top_k", "sampled"] = "auto"
    """Kind of target for the loss; 'auto' is the most exact kind that the objective can use."""
    offload: bool = False
    """Keep it in CPU memory while it is not asked (its output layer stays on the device): slower, and room for more teachers."""
    cache: str | None = None
    """Folder in which its scores are kept by content: a response that was scored before, in this run or another, costs no forward
    pass. Runs and teachers may share one."""

    def __post_init__(self) -> None:
        at_least(1, self, "tokens_per_batch")
        require(
            bool(self.model) or self.source != "model",
            "'teacher.model' is not set, and has no default. Add it to the recipe or pass --teacher.model VALUE; teacher.source=ema, "
            "adapter_off or student teaches the student by itself.",
        )
        require(
            not self.model or self.source == "model",
            f"teacher.source={self.source} takes the student's own weights, so teacher.model='{self.model}' is not read; drop one.",
        )
        require(0 <= self.ema_decay < 1, f"teacher.ema_decay must lie in [0, 1), not {self.ema_decay}")
        require(
            self.source == "model" or not self.offload,
            f"teacher.offload=true would take the student itself off its device with teacher.source={self.source}; drop it.",
        )
        require(
            self.cache is None or bool(self.cache.strip()),
            "teacher.cache is empty; name a folder for the kept scores, or drop it.",
        )
        require(
            self.cache is None or self.source in ("model", "adapter_off"),
            f"teacher.cache='{self.cache}' keeps scores for later, and with teacher.source={self.source} the teacher's weights move with "
            "every step, so that none would ever be read again; drop it.",
        )


class BaseMixtureConfig(Section, key="mixture"):
    """The kind of a mixture of teachers and its weights. Shared by the recipe and verl's `opd.mixture`."""

    kind: Literal["routing", "probability", "logit", "loss"] = "routing"
    """routing: every prompt has one teacher, which its column prompts.teacher_column names; probability: Σ w q; logit: softmax of
    Σ w log q; loss: Σ w D(S, T), a loss for each."""
    weights: dict[str, float] = field(default_factory=dict[str, float])
    """Weight of every teacher by name, 1 in sum; empty is the same for all. With routing, read by balance_tokens."""

    def __post_init__(self) -> None:
        if self.weights:
            check_weights("mixture.weights", self.weights)
            require(self.reads_weights, f"mixture.weights {self._idle}")

    @property
    def reads_weights(self) -> bool:
        """The weights of the teachers matter."""
        return self.kind != "routing"

    _idle: ClassVar[str] = (
        "would change nothing: with mixture.kind=routing a prompt has one teacher. Use another kind, or drop it."
    )

    def check_names(self, names: Sequence[str]) -> None:
        """Raise ConfigError for weights of teachers that are not there, or teachers without one."""
        check_names("mixture.weights", self.weights, names)

    def at(self, step: int, total_steps: int, names: Sequence[str]) -> dict[str, float]:
        """The weights of this step."""
        return {name: self.weights[name] if self.weights else 1.0 / len(names) for name in names}


class MixtureConfig(BaseMixtureConfig, key="mixture"):
    """Mixture of several teachers (section teachers). Read where there are two or more."""

    weights_end: dict[str, float] = field(default_factory=dict[str, float])
    """The weights move to these, linearly; empty keeps them."""
    schedule_steps: int | None = None
    """Steps that the move takes; None is the whole run."""
    weights_column: str | None = None
    """Column of the prompts with weights of their own, e.g. {"math": 0.7, "code": 0.3}; a prompt without takes mixture.weights."""
    balance_tokens: bool = False
    """routing: the tokens of every teacher's prompts count as mixture.weights say in sum, however many or long the responses are."""

    _idle = (
        "would change nothing: with mixture.kind=routing a prompt has one teacher. Set balance_tokens=true to weigh the teachers' tokens, "
        "or another kind."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights_end:
            check_weights("mixture.weights_end", self.weights_end)
        at_least(1, self, "schedule_steps")
        require(
            self.schedule_steps is None or bool(self.weights_end),
            f"mixture.schedule_steps={self.schedule_steps} is how long the weights move, and they do not; set mixture.weights_end, or drop it.",
        )
        require(
            not self.balance_tokens or self.kind == "routing",
            f"mixture.balance_tokens is about prompts that have a teacher each, and mixture.kind={self.kind} asks all teachers about "
            "all prompts; use kind=routing, or mixture.weights.",
        )
        require(self.reads_weights or not self.weights_end, f"mixture.weights_end {self._idle}")
        require(
            self.weights_column is None or self.kind != "routing",
            "mixture.weights_column gives a prompt several teachers, and mixture.kind=routing gives it one; use kind=probability, logit "
            "or loss.",
        )

    @property
    def reads_weights(self) -> bool:
        """The weights of the teachers matter."""
        return self.kind != "routing" or self.balance_tokens

    def check_names(self, names: Sequence[str]) -> None:
        """Raise ConfigError for weights of teachers that are not there, or teachers without one."""
        super().check_names(names)
        check_names("mixture.weights_end", self.weights_end, names)

    def at(self, step: int, total_steps: int, names: Sequence[str]) -> dict[str, float]:
        """The weights of this step."""
        start = super().at(step, total_steps, names)
        if not self.weights_end:
            return start
        steps = self.schedule_steps or max(1, total_steps - 1)
        return {name: linear_schedule(start[name], self.weights_end[name], steps).at(step) for name in names}

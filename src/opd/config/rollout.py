"""Section of the rollouts."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Literal

from opd.config.rules import at_least
from opd.config.sections import Section
from opd.config.vllm import VllmConfig
from opd.errors import require
from opd.losses.weights import linear_schedule

DEFAULT_IMPORTANCE_CAP = 2.0


class RolloutConfig(Section, key="rollout"):
    """Sampling of the student's responses."""

    max_new_tokens: int = 256
    """Length limit of a response, EOS included. A response cut here does not supervise EOS."""
    horizon_start: int | None = None
    """Progressive horizon: responses end at this length at first, and at max_new_tokens from step horizon_steps on; None is off."""
    horizon_steps: int | None = None
    """Steps from horizon_start to max_new_tokens; None is half of the run."""
    temperature: float = 1.0
    """Sampling temperature. 1.0 keeps the samples on-policy for a loss at temperature 1."""
    top_p: float = 1.0
    """Nucleus sampling; 1.0 is off."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 is off."""
    stop: tuple[str, ...] = ()
    """Strings that end a response."""
    batch_size: int = 256
    """Rows generated at once; lower it when generation runs out of memory."""
    lmbda: float = 1.0
    """Share of on-policy samples (the λ of arXiv 2306.13649), drawn per sample; the rest come from `off_policy`."""
    off_policy: Literal["dataset", "teacher"] = "dataset"
    """Source of the other 1 − lmbda: the data set's response column, or the teacher's own samples."""
    cross_entropy: float = 0.0
    """Weight of −log p of every token of these other responses, added to their divergence: supervised learning beside distillation, in
    the same pass. Metric: off_policy/student_logp, of the opposite sign (student_logp with lmbda=0)."""
    source: Literal["live", "cached"] = "live"
    """live: drawn from the student as it is at every step. cached: drawn once from the student before training, by opd rollouts."""
    path: str | None = None
    """source=cached: the folder that opd rollouts has filled."""

    engine: Literal["hf", "vllm"] = "hf"
    """What draws the student's samples: transformers in this process, or vLLM (section rollout.vllm), which is faster on long ones."""
    vllm: VllmConfig = field(default_factory=VllmConfig)
    """With engine=vllm: where vLLM runs, and how weights get there."""
    ahead: int = 0
    """With engine=vllm: 1 draws the next step's responses while this step is scored and updates, from weights that are one update
    older (metric staleness); 0 draws them from the newest weights. Losses of the sampled token weigh them by student / sampler."""
    importance_cap: float = DEFAULT_IMPORTANCE_CAP
    """With engine=vllm, for losses of the sampled token: its weight student / sampler is cut here (truncated importance sampling).
    Losses that are exact at every position take none."""

    def __post_init__(self) -> None:
        at_least(1, self, "max_new_tokens", "batch_size")
        self._check_engine()
        self._check_ahead()
        start = self.horizon_start
        require(
            start is None or 1 <= start <= self.max_new_tokens,
            f"rollout.horizon_start must lie between 1 and rollout.max_new_tokens={self.max_new_tokens}, not {start}",
        )
        require(
            self.horizon_steps is None or (start is not None and self.horizon_steps >= 1),
            f"rollout.horizon_steps={self.horizon_steps} is how long the horizon grows from rollout.horizon_start, which is not set or "
            "takes no step; set both (steps ≥ 1), or neither.",
        )
        require(
            math.isfinite(self.temperature) and self.temperature > 0,
            f"rollout.temperature must be a positive number, not {self.temperature}: training needs samples of the "
            "student's own distribution, and greedy decoding is not one. Use 1.0.",
        )
        require(0 < self.top_p <= 1, f"rollout.top_p must be in (0, 1], not {self.top_p}; 1.0 switches it off")
        require(self.top_k >= 0, f"rollout.top_k must be 0 (off) or positive, not {self.top_k}")
        require(0 <= self.lmbda <= 1, f"rollout.lmbda is a share of samples, from 0 to 1, not {self.lmbda}")
        require(
            self.lmbda < 1 or self.off_policy == "dataset",
            "rollout.off_policy=teacher is read where rollout.lmbda < 1; lmbda=1 samples from the student alone. Lower lmbda, or drop it.",
        )
        ok = math.isfinite(self.cross_entropy) and self.cross_entropy >= 0
        require(ok, f"rollout.cross_entropy must be a weight ≥ 0, not {self.cross_entropy}; 0 leaves it out")
        require(
            self.cross_entropy == 0 or self.lmbda < 1,
            f"rollout.cross_entropy={self.cross_entropy} is about responses that the student did not draw, and rollout.lmbda=1 draws all from "
            "it. Set rollout.lmbda below 1, or drop it.",
        )
        require(
            self.source == "live" or bool(self.path and self.path.strip()),
            "rollout.source=cached trains on kept rollouts, and rollout.path does not say where they are. Draw them with opd rollouts "
            "RECIPE.yaml --out DIR, and set rollout.path to that folder.",
        )
        require(
            self.source == "cached" or self.path is None,
            f"rollout.path='{self.path}' is read where rollout.source=cached; set it, or drop the path.",
        )
        require(
            self.source == "live" or start is None,
            f"rollout.horizon_start={start} lets responses grow, and with rollout.source=cached they are all there already; drop it.",
        )
        require(all(self.stop), "rollout.stop holds an empty string, which would end every response at once")

    def _check_ahead(self) -> None:
        require(
            self.ahead in (0, 1),
            f"rollout.ahead must be 0 or 1, not {self.ahead}: an engine draws the responses of one step at a time, so that more steps ahead "
            "would be older and no sooner there.",
        )
        require(
            self.ahead == 0 or (self.engine == "vllm" and self.vllm.mode != "colocate"),
            "rollout.ahead=1 draws while this process trains, which takes a server: set rollout.engine=vllm with rollout.vllm.mode=managed or "
            "server, or rollout.ahead=0.",
        )
        require(
            self.ahead == 0 or self.lmbda == 1 or self.off_policy == "dataset",
            "rollout.off_policy=teacher draws from the model that scores at the same time with rollout.ahead=1. Use off_policy=dataset, or "
            "rollout.ahead=0.",
        )
        require(
            self.ahead == 0 or self.source == "live",
            "rollout.ahead=1 is about drawing, and with rollout.source=cached everything is drawn already; drop it.",
        )

    def _check_engine(self) -> None:
        if self.engine == "hf":
            require(
                self.vllm == VllmConfig(),
                "rollout.vllm is read with rollout.engine=vllm, and the engine is hf, which samples in this process; set "
                "rollout.engine=vllm, or drop the section.",
            )
            require(
                self.importance_cap == DEFAULT_IMPORTANCE_CAP,
                f"rollout.importance_cap={self.importance_cap} is read with rollout.engine=vllm; the samples of engine=hf are the student's "
                "own, so that their weight is 1. Drop it.",
            )
        require(
            math.isfinite(self.importance_cap) and self.importance_cap >= 1,
            f"rollout.importance_cap must be a number of at least 1, the weight of a token on which sampler and student agree, not "
            f"{self.importance_cap}",
        )

    def horizon(self, step: int, total_steps: int) -> int:
        """The length limit of this step's responses."""
        if self.horizon_start is None:
            return self.max_new_tokens
        steps = self.horizon_steps or max(1, total_steps // 2)
        return round(linear_schedule(self.horizon_start, self.max_new_tokens, steps).at(step))

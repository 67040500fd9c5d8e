"""Sections of a step's size, of evaluation, checkpoints and logs."""

from __future__ import annotations

import math
from typing import Literal

from opd.config.rules import at_least
from opd.config.sections import Section
from opd.errors import require

GPU_MICROBATCH = 8192


class TrainConfig(Section, key="train"):
    """The size and shape of a step. One step is one batch of rollouts and one optimizer update."""

    steps: int = 100
    """Optimizer steps."""
    prompts_per_step: int = 64
    """Prompts drawn per step."""
    samples_per_prompt: int = 4
    """Rollouts per prompt."""
    tokens_per_microbatch: int | None = None
    """Tokens (padding included) of one forward and backward pass; gradients accumulate over the micro-batches of a step. What grows
    with it is the student's activations: the loss takes logits in chunks of its own. None is 8192 on a GPU; on a CPU, where small
    batches cost little time, as many from 512 to 8192 as have 1 GiB of activations. A run's config.yaml says the number."""
    token_fraction: float = 1.0
    """Train on this share of a step's response tokens, those where the student was least sure (highest entropy, arXiv 2506.01939).
    The others cost no product with an output layer."""
    drop: tuple[Literal["truncated", "repeating", "correct"], ...] = ()
    """Leave these responses out of the loss, which is normalised by what is left (arXiv 2610.03185): those cut off at the length limit,
    those half of whose 4-grams are repetitions, and those with a reward of 1 or more (rl.reward, or eval.reward). Metrics: drop/*."""
    layout: Literal["right_padded", "left_padded", "packed"] = "right_padded"
    """Layout of sequences in a micro-batch. 'packed' has no padding."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Run the student's matrix products in bfloat16, with float32 weights; logits, divergence and the sums of gradients stay float32.
    On a CPU the output layer rounds its operands alike but multiplies them in float32, so it gains no speed there; in a model that
    does more to its logits than a product (a soft-cap) it stays in float32 everywhere."""
    loss_memory: Literal["fast", "minimal"] = "fast"
    """Memory of the loss: 'fast' holds the logits of one chunk of tokens; 'minimal' a few MiB beside the gradients, and computes the
    logits twice. It takes one teacher and a KL, JSD or skewed KL over the whole vocabulary, top-k, or sampled log-probs."""
    parallel: Literal["auto", "ddp", "fsdp2"] = "auto"
    """How several processes (--devices N, or torchrun) divide the work, each with its share of the prompts. 'ddp': each has the whole
    student and teacher. 'fsdp2': the weights of all models, the gradients and AdamW's state are divided too. 'auto': 'ddp' where that
    fits on every GPU, and on a CPU; else 'fsdp2'."""

    @property
    def microbatch(self) -> int:
        """Tokens of a micro-batch: those of a GPU where the recipe leaves them open, and nobody has settled them yet."""
        return self.tokens_per_microbatch or GPU_MICROBATCH

    def __post_init__(self) -> None:
        at_least(1, self, "steps", "prompts_per_step", "samples_per_prompt")
        if self.tokens_per_microbatch is not None:
            at_least(1, self, "tokens_per_microbatch")
        require(0 < self.token_fraction <= 1, f"train.token_fraction must lie in (0, 1], not {self.token_fraction}")


class EvalConfig(Section, key="eval"):
    """Held-out evaluation: task reward and reverse KL to the teacher, with intervals."""

    every: int = 10
    """Evaluate every n steps, and before the first and after the last; 0 switches it off."""
    prompts: int = 256
    """Held-out prompts used."""
    samples_per_prompt: int = 1
    """Samples per held-out prompt."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    extra_temperatures: tuple[float, ...] = ()
    """More temperatures for the first and the last evaluation: shows whether training did more than sharpen."""
    reward: str = "exact_match"
    """'exact_match', 'numeric_answer', 'math_verify' (extra 'math'), 'reasoning_gym' (for prompts.path: reasoning_gym:NAME),
    'regex:<pattern>', or 'package.module:function' of (prompt, response). A parameter finished, if it has one, is False for a response
    cut off at the length limit."""

    def __post_init__(self) -> None:
        require(self.every >= 0, f"eval.every must be 0 (off) or positive, not {self.every}")
        at_least(1, self, "prompts", "samples_per_prompt")
        for name, values in (("temperature", (self.temperature,)), ("extra_temperatures", self.extra_temperatures)):
            for value in values:
                ok = math.isfinite(value) and value >= 0
                require(ok, f"eval.{name} must be 0 (greedy) or positive, not {value}")


class CheckpointConfig(Section, key="checkpoint"):
    """Checkpoints are written beside, then renamed: a kill at any moment leaves the last good one."""

    every: int = 20
    """Save every n steps; 0 saves only the final student, and what a run has reached when a signal stops it."""
    keep: int = 2
    """Newest checkpoints kept."""

    def __post_init__(self) -> None:
        require(self.every >= 0, f"checkpoint.every must be 0 (off) or positive, not {self.every}")
        at_least(1, self, "keep")


class LogConfig(Section, key="log"):
    """Display and records. JSONL is always written."""

    progress: Literal["auto", "rich", "plain", "off"] = "auto"
    """Live display on a terminal, lines elsewhere."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra 'tensorboard')."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (extra 'wandb')."""
    trackio_project: str | None = None
    """Also log to this Trackio project (extra 'trackio'), on this disk; trackio show opens it."""
    samples_every: int = 10
    """Keep some rollouts with what both models said at each token every n steps."""
    samples: int = 4
    """Rollouts kept each time."""
    reward: bool = False
    """Judge the responses of every training step by eval.reward (metric reward/mean), also where the loss does not read rewards."""
    show_samples: int = 0
    """Show one sampled answer every n steps, with its prompt, reward and mean reverse KL; 0 shows none."""

    def __post_init__(self) -> None:
        at_least(1, self, "samples_every")
        at_least(0, self, "show_samples")
        require(self.samples >= 0, f"log.samples must not be negative, not {self.samples}")

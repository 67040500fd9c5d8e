"""What a run can be told: frozen sections with a help text under every field, each with its own rules. Starts no model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from opd.config.algorithm import (
    MixtureConfig,
    RewardConfig,
    RlConfig,
    RolloutConfig,
    check_on_policy,
    check_rewarded_rollouts,
)
from opd.config.optimizer import OptimizerConfig
from opd.config.sections import Section
from opd.errors import require
from opd.losses import Objective

DType = Literal["auto", "float32", "bfloat16", "float16"]
USUAL_LORA_SCALE = 2  # alpha = 2 · rank: LLaMA-Factory's default, and what Unsloth and TRL's examples use


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685) through peft. Off unless one of these keys is set; needs `pip install 'opd[peft]'`."""

    rank: int = 32
    """Rank of every adapter."""
    alpha: int | None = None
    """Scale: the update is alpha / rank · B A. Unset, it is twice the rank, so that the scale stays 2 whatever the rank."""
    target_modules: str = "all-linear"
    """'all-linear', or a comma-separated list of module names."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"student.lora.rank must be at least 1, not {self.rank}")
        require(self.alpha is None or self.alpha > 0, f"student.lora.alpha must be positive, not {self.alpha}")
        if self.alpha is None:
            object.__setattr__(self, "alpha", USUAL_LORA_SCALE * self.rank)  # config.yaml says the number


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """A causal language model and how to load it."""

    model: str
    """Local folder or hub name of a causal language model."""
    revision: str | None = None
    """Hub revision."""
    device: str = "auto"
    """'auto' (CUDA when there is one; for the teacher, where the student is), 'cpu', 'cuda', 'cuda:1'."""
    attn_implementation: str | None = None
    """'sdpa', 'eager', 'flash_attention_2'; None leaves it to transformers."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the model's own chat template, e.g. enable_thinking: false; a row's column chat_template_kwargs comes before them.
    chat_template: NAME chooses among several templates."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig(ModelConfig):
    """The model that samples and learns."""

    dtype: DType = "float32"
    """Type of the weights, of the optimizer state and of the saved student; float32 with train.autocast is the safe choice."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of all weights; set lora.rank to switch it on."""

    def __post_init__(self) -> None:
        require(
            self.dtype != "float16" or self.lora is not None,
            "student.dtype=float16 cannot be trained: Adam's second moments underflow in it. Use float32 with "
            "train.autocast=bfloat16, or adapters (student.lora.rank=32).",
        )


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(ModelConfig):
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
    """What it hands to the loss; 'auto' is the most exact kind that the objective can use."""
    offload: bool = False
    """Keep it in CPU memory while it is not asked (its output layer stays on the device): slower, and room for more teachers."""

    def __post_init__(self) -> None:
        require(self.tokens_per_batch >= 1, f"teacher.tokens_per_batch must be positive, not {self.tokens_per_batch}")
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


@dataclass(frozen=True, kw_only=True)
class PromptsConfig(Section):
    """Where the prompts come from."""

    path: str
    """JSONL, JSON or parquet file, a dataset folder, or 'hub:owner/name'."""
    eval_path: str | None = None
    """Held-out prompts, in the same form."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    eval_split: str = "test"
    """Split of a Hugging Face dataset for eval_path."""
    prompt_column: str = "prompt"
    """Text, or a list of chat messages; a.b names a field inside a column, here and below. The columns tools, documents and
    chat_template_kwargs go to the chat template with the messages, as JSON text where the order of keys or a null matters: parquet
    and datasets keep neither."""
    answer_column: str = "answer"
    """Reference answer for the reward (optional)."""
    response_column: str = "response"
    """Reference response for off-policy distillation (optional); without it, the last message of the assistant is one."""
    teacher_column: str = "teacher"
    """Name of the teacher of each prompt (optional)."""
    system: str | None = None
    """System message put before chat prompts that have none."""
    teacher_prompt: str | None = None
    """Jinja template of what the teacher reads in place of the prompt; may use any column, e.g. "{{ prompt }} (answer: {{ answer }})"."""
    shuffle: bool = True
    """A new order every epoch, from the seed."""
    limit: int | None = None
    """Use only the first rows."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """The size and shape of a step. One step is one batch of rollouts and one optimizer update."""

    steps: int = 100
    """Optimizer steps."""
    prompts_per_step: int = 64
    """Prompts drawn per step."""
    samples_per_prompt: int = 4
    """Rollouts per prompt."""
    tokens_per_microbatch: int = 8192
    """Tokens (padding included) of one forward and backward pass; gradients accumulate over the micro-batches of a step. What grows
    with it is the student's activations: the loss takes logits in chunks of its own."""
    token_fraction: float = 1.0
    """Train on this share of a step's response tokens, those where the student was least sure (highest entropy, arXiv 2506.01939).
    The others cost no product with an output layer."""
    layout: Literal["right_padded", "left_padded", "packed"] = "right_padded"
    """How sequences share a micro-batch. 'packed' has no padding."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Run the student's matrix products in bfloat16, with float32 weights; logits, divergence and the sums of gradients stay float32.
    On a CPU the output layer rounds its operands alike but multiplies them in float32, so it gains no speed there; in a model that
    does more to its logits than a product (a soft-cap) it stays in float32 everywhere."""

    loss_memory: Literal["fast", "minimal"] = "fast"
    """Memory of the loss: 'fast' holds the logits of one chunk of tokens; 'minimal' a few MiB beside the gradients, and computes the
    logits twice. It takes one teacher and a KL, JSD or skewed KL over the whole vocabulary, top-k, or sampled log-probs."""

    def __post_init__(self) -> None:
        for name in ("steps", "prompts_per_step", "samples_per_prompt", "tokens_per_microbatch"):
            require(getattr(self, name) >= 1, f"train.{name} must be at least 1, not {getattr(self, name)}")
        require(0 < self.token_fraction <= 1, f"train.token_fraction must lie in (0, 1], not {self.token_fraction}")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Section):
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
    """'exact_match', 'numeric_answer', 'regex:<pattern>', or 'package.module:function' of (prompt, response). A parameter finished, if
    it has one, is False for a response cut off at the length limit."""

    def __post_init__(self) -> None:
        require(self.every >= 0, f"eval.every must be 0 (off) or positive, not {self.every}")
        require(self.prompts >= 1, f"eval.prompts must be at least 1, not {self.prompts}")
        require(
            self.samples_per_prompt >= 1, f"eval.samples_per_prompt must be at least 1, not {self.samples_per_prompt}"
        )
        for name, values in (("temperature", (self.temperature,)), ("extra_temperatures", self.extra_temperatures)):
            for value in values:
                ok = math.isfinite(value) and value >= 0
                require(ok, f"eval.{name} must be 0 (greedy) or positive, not {value}")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """Checkpoints are written beside, then renamed: a kill at any moment leaves the last good one."""

    every: int = 20
    """Save every n steps; 0 saves only the final student, and what a run has reached when a signal stops it."""
    keep: int = 2
    """Newest checkpoints kept."""

    def __post_init__(self) -> None:
        require(self.every >= 0, f"checkpoint.every must be 0 (off) or positive, not {self.every}")
        require(self.keep >= 1, f"checkpoint.keep must be at least 1, not {self.keep}")


@dataclass(frozen=True, kw_only=True)
class LogConfig(Section):
    """What is shown and kept. JSONL is always written."""

    progress: Literal["auto", "rich", "plain", "off"] = "auto"
    """Live display on a terminal, lines elsewhere."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra 'tensorboard')."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (extra 'wandb')."""
    samples_every: int = 10
    """Keep some rollouts with their per-token reverse KL every n steps."""
    samples: int = 4
    """Rollouts kept each time."""

    def __post_init__(self) -> None:
        require(self.samples_every >= 1, f"log.samples_every must be at least 1, not {self.samples_every}")
        require(self.samples >= 0, f"log.samples must not be negative, not {self.samples}")


@dataclass(frozen=True, kw_only=True)
class Config(Section, whole=True):
    """A whole run."""

    student: StudentConfig
    teacher: TeacherConfig | None = None
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    """Several teachers by name, in place of `teacher`: --teachers.math.model PATH --teachers.code.model PATH."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    prompts: PromptsConfig
    objective: Objective = field(default_factory=Objective)
    rl: RlConfig = field(default_factory=RlConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    run_dir: str = "runs/opd"
    """Folder of this run: resolved config, metrics, samples, checkpoints, student, report."""
    seed: int = 0
    """Every random draw of the run derives from it."""

    def __post_init__(self) -> None:
        require(
            self.objective.top_k == 64 or self.objective.support not in ("full", "sampled"),
            f"objective.top_k={self.objective.top_k} is read by top-k supports, and objective.support={self.objective.support} looks at "
            "something else; set objective.support=teacher_top_k, student_top_k or union, or drop top_k.",
        )
        require(bool(self.run_dir.strip()), "run_dir is empty; name a folder for this run, e.g. runs/first.")
        warmup = self.optimizer.warmup_within(self.train.steps)
        object.__setattr__(self, "optimizer", replace(self.optimizer, warmup_steps=warmup))
        self._check_teachers()
        self.rl.check(self.objective, samples_per_prompt=self.train.samples_per_prompt)
        part = self.train.token_fraction < 1
        require(
            not part or self.rollout.lmbda == 1,
            f"train.token_fraction={self.train.token_fraction} needs the entropy of the student that drew each token, and rollout.lmbda="
            f"{self.rollout.lmbda} takes some from elsewhere; set one of them to 1.",
        )
        require(
            not part or self.objective.discount == 0,
            f"objective.discount={self.objective.discount} adds what all later tokens earn, and train.token_fraction="
            f"{self.train.token_fraction} leaves some out; set discount=0 or token_fraction=1.",
        )
        if self.optimizer.name == "natural_gradient":
            self._check_natural_gradient()
        check_on_policy(self.objective, self.rollout)
        if self.rl.rewarded:
            check_rewarded_rollouts(self.objective, self.rollout)

    @property
    def all_teachers(self) -> dict[str, TeacherConfig]:
        """Every teacher by name; one alone is called 'teacher'."""
        return {"teacher": self.teacher} if self.teacher is not None else dict(self.teachers)

    def _check_natural_gradient(self) -> None:
        student = self.student
        require(
            not student.gradient_checkpointing,
            "student.gradient_checkpointing=true recomputes activations once per backward pass, and natural_gradient goes back through "
            "them dozens of times a step. Drop it, and save memory with optimizer.natural_gradient.keep_graphs=false and a smaller "
            "train.tokens_per_microbatch.",
        )
        require(
            student.dtype != "float16",
            "student.dtype=float16 has no room for the products of small numbers that natural_gradient's second derivatives are made of. "
            "Use bfloat16 with the same adapters, or optimizer.name=adamw.",
        )
        require(
            student.attn_implementation in (None, "sdpa", "eager"),
            f"student.attn_implementation={student.attn_implementation} has one derivative, and natural_gradient needs two. Use sdpa or "
            "eager, or optimizer.name=adamw.",
        )
        require(
            student.dtype in ("auto", "float32") or student.lora is not None,
            f"student.dtype={student.dtype} rounds away most of a natural-gradient step. Use float32, or float32 adapters on such a "
            "student (student.lora.rank=32).",
        )

    def _check_teachers(self) -> None:
        there = self.all_teachers
        require(
            bool(there) or not self.rl.distilled,
            "'teacher' is not set, and has no default. Add it to the recipe or pass --teacher.model VALUE; learning from a reward alone "
            "(rl.weight=1, rl.distill_weight=0) needs none.",
        )
        require(
            bool(there) or self.rollout.off_policy == "dataset",
            "rollout.off_policy=teacher draws samples from the teacher, and there is none; set teacher.model, or drop it.",
        )
        require(
            self.teacher is None or not self.teachers,
            f"teacher is one teacher, and teachers ({', '.join(self.teachers)}) are several; put it among teachers under a name of its "
            "own, or drop one of the two sections.",
        )
        require(
            len(there) > 1 or self.mixture == MixtureConfig(),
            "mixture says how several teachers make one, and there are not several; add the section teachers, or drop mixture.",
        )
        wrong = [name for name in self.teachers if not name or any(c in name for c in "./ ")]
        require(
            not wrong,
            f"teachers.{wrong and wrong[0]!r}: a teacher's name is a plain word, without dots, slashes and spaces.",
        )
        self.mixture.check_names(list(there))
        self._check_self_teaching()

    def _check_self_teaching(self) -> None:
        there = self.all_teachers.values()
        require(
            self.student.lora is not None or all(t.source != "adapter_off" for t in there),
            "teacher.source=adapter_off is the student without its adapter, and it has none; set student.lora.rank, or use source=ema.",
        )
        require(
            bool(there) or self.prompts.teacher_prompt is None,
            "prompts.teacher_prompt is what a teacher reads, and there is none; set teacher.model or teacher.source, or drop it.",
        )
        same = self.objective.student_temperature == self.objective.teacher_temperature
        alone = bool(there) and all(t.source != "model" for t in there) and not self.rl.rewarded
        require(
            not (alone and same and self.prompts.teacher_prompt is None),
            "A teacher with the student's own first weights agrees with it everywhere, so nothing would ever be learnt. Show it more with "
            "prompts.teacher_prompt, give it an objective.teacher_temperature below 1, or add a reward (rl.weight).",
        )

"""Sections of the models: what all have in common, the student, and its adapter."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from opd.config.rules import at_least
from opd.config.sections import Section
from opd.errors import require

Quantization = Literal[
    "bitsandbytes-4bit", "bitsandbytes-8bit", "torchao-int8", "torchao-float8", "fp8", "compressed-tensors"
]
DType = Literal["auto", "float32", "bfloat16", "float16"]
USUAL_LORA_SCALE = 2  # alpha = 2 · rank: LLaMA-Factory's default, and what Unsloth and TRL's examples use


class LoraConfig(Section, key="student.lora"):
    """Low-rank adapters (arXiv 2106.09685) through peft. Off unless one of these keys is set; needs `pip install 'opd[peft]'`."""

    rank: int = 32
    """Rank of every adapter."""
    alpha: int | None = None
    """Scale: the update is alpha / rank · B A. Unset, it is twice the rank, so that the scale stays 2 whatever the rank."""
    target_modules: str = "all-linear"
    """'all-linear', or a comma-separated list of module names."""

    def __post_init__(self) -> None:
        at_least(1, self, "rank")
        require(self.alpha is None or self.alpha > 0, f"student.lora.alpha must be positive, not {self.alpha}")
        if self.alpha is None:
            self._fill_in(alpha=USUAL_LORA_SCALE * self.rank)


class LoadOptionsConfig(Section, key="load_options"):
    """A quantised model, by transformers' own methods: less memory, other numbers. The output layer stays whole. A student needs
    adapters beside it (QLoRA, arXiv 2305.14314)."""

    quantization: Quantization | None = None
    """A method by name; each needs its package. compressed-tensors is for checkpoints that were made so."""
    quantization_config: dict[str, Any] = field(default_factory=dict[str, Any])
    """Any other, as transformers writes it in a quantised model's config.json, e.g. quant_method: bitsandbytes, load_in_8bit: true."""

    def __post_init__(self) -> None:
        require(
            self.quantization is None or not self.quantization_config,
            f"load_options.quantization={self.quantization} and load_options.quantization_config both say how to quantise; drop one.",
        )

    def __bool__(self) -> bool:
        """Something is asked for."""
        return self.quantization is not None or bool(self.quantization_config)


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
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    """Arguments of the model's own chat template, e.g. enable_thinking: false; a row's column chat_template_kwargs comes before them.
    chat_template: NAME chooses among several templates."""
    load_options: LoadOptionsConfig = field(default_factory=LoadOptionsConfig)
    """Quantise it as it is loaded."""


class StudentConfig(ModelConfig, key="student"):
    """The model that samples and learns."""

    dtype: DType = "float32"
    """Type of the weights and of the optimizer state (save.dtype is that of the saved student); float32 with train.autocast is the safe choice."""
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
        require(
            not self.load_options or self.lora is not None,
            "student.load_options quantises the student, and quantised weights cannot be trained. Train adapters beside them "
            "(student.lora.rank=32), or drop it.",
        )

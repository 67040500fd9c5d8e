"""What the folders of tools/real_tokenizers.py hold: published sizes, end ids, and each model's changes to its family's tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
HARMONY = """
{%- set ns = namespace(system='') -%}
{%- if messages[0].role in ('system', 'developer') -%}{%- set ns.system = messages[0].content -%}{%- endif -%}
<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.
Knowledge cutoff: 2024-06
Current date: {{ strftime_now('%Y-%m-%d') }}

Reasoning: {{ reasoning_effort | default('medium') }}

# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>
{%- if ns.system -%}<|start|>developer<|message|># Instructions

{{ ns.system }}

<|end|>{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}<|start|>user<|message|>{{ message.content }}<|end|>
{%- elif message.role == 'assistant' -%}
<|start|>assistant<|channel|>final<|message|>{{ message.content }}
{%- if loop.last and not add_generation_prompt -%}<|return|>{%- else -%}<|end|>{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
""".strip()
"""The harmony format of gpt-oss for plain conversations, written from its public description."""
R1_TOKENS = {
    151643: "<｜end▁of▁sentence｜>",
    151644: "<｜User｜>",
    151645: "<｜Assistant｜>",
    151646: "<｜begin▁of▁sentence｜>",
    151647: "<|EOT|>",
    151648: "<think>",
    151649: "</think>",
}
"""Tokens of DeepSeek-R1-Distill-Qwen in the place of Qwen2.5's."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model: the package of its tokenizer, its config.json, and the ids that its generation config stops at."""

    package: str
    config: Mapping[str, Any]
    ends: Sequence[int]
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Values in the place of those of tokenizer_config.json; None removes one."""
    edit: Callable[[Json, Json], None] | None = None
    """Changes tokenizer.json and tokenizer_config.json in place."""

    def changed(self, tokenizer: Json, settings: Json) -> tuple[Json, Json]:
        """This model's tokenizer.json and tokenizer_config.json, from its family's."""
        settings = {**settings, **self.settings}
        if self.edit is not None:
            self.edit(tokenizer, settings)
        return tokenizer, {key: value for key, value in settings.items() if value is not None}


def _distilled(tokenizer: Json, settings: Json) -> None:
    """Qwen2.5's tokenizer as DeepSeek changed it for the models that it distilled from R1."""
    for token in tokenizer["added_tokens"]:
        token["content"] = R1_TOKENS.get(token["id"], token["content"])
    bos = {"id": R1_TOKENS[151646], "ids": [151646], "tokens": [R1_TOKENS[151646]]}
    begin = {"SpecialToken": {"id": bos["id"], "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos["id"]: bos},
    }
    settings.pop("added_tokens_decoder", None)
    settings.pop("additional_special_tokens", None)


def _thinking(tokenizer: Json, settings: Json) -> None:
    """DeepSeek-R1's template: V3's, with a thought opened before the answer, and thoughts left out of earlier turns."""
    template = settings["chat_template"]
    opened = template.replace(
        "not ns.is_tool %}{{'<｜Assistant｜>'}}", "not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}"
    )
    shown = opened.replace(
        "{{'<｜Assistant｜>' + message['content'] +", "{{'<｜Assistant｜>' + message['content'].split('</think>')[-1] +"
    )
    assert template != opened != shown
    settings["chat_template"] = shown


R1_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
"""R1's format for plain conversations."""
R1_SETTINGS = {
    "bos_token": R1_TOKENS[151646],
    "eos_token": R1_TOKENS[151643],
    "pad_token": R1_TOKENS[151643],
    "add_bos_token": True,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "chat_template": R1_TEMPLATE,
}


def _sizes(kind: str, sizes: Sequence[int], **more: Any) -> Json:
    """`sizes` are hidden, layers, heads, heads of keys and values, feed-forward, vocabulary, positions."""
    names = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
        "max_position_embeddings",
    )  # fmt: skip
    return {
        "model_type": kind,
        **dict(zip(names, sizes, strict=True)),
        "dtype": "bfloat16",
        "transformers_version": "4.51.0",
        **more,
    }


def _gemma_4b() -> Json:
    text = _sizes("gemma3_text", (2560, 34, 8, 4, 10240, 262208, 131072), head_dim=256)
    vision = {"model_type": "siglip_vision_model", "hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16,
              "intermediate_size": 4304, "image_size": 896, "patch_size": 14}  # fmt: skip
    names = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "dtype": "bfloat16",
        "transformers_version": "4.51.0",
    }
    return {**names, "text_config": text, "vision_config": vision}


QWEN3_06B = _sizes("qwen3", (1024, 28, 16, 8, 3072, 151936, 40960), head_dim=128, tie_word_embeddings=True)
QWEN3_8B = _sizes("qwen3", (4096, 36, 32, 8, 12288, 151936, 40960), head_dim=128, tie_word_embeddings=False)
MATH_15B = _sizes("qwen2", (1536, 28, 12, 2, 8960, 151936, 4096), tie_word_embeddings=True)
R1_15B = _sizes("qwen2", (1536, 28, 12, 2, 8960, 151936, 131072), tie_word_embeddings=False)
R1_7B = _sizes("qwen2", (3584, 28, 28, 4, 18944, 152064, 131072), tie_word_embeddings=False)
LLAMA3_8B = _sizes("llama", (4096, 32, 32, 8, 14336, 128256, 8192), tie_word_embeddings=False)
LLAMA32_1B = _sizes("llama", (2048, 16, 32, 8, 8192, 128256, 131072), head_dim=64, tie_word_embeddings=True)
GEMMA_1B = _sizes("gemma3_text", (1152, 26, 4, 1, 6912, 262144, 32768), head_dim=256, tie_word_embeddings=True)
OSS = {"head_dim": 64, "num_experts_per_tok": 4, "tie_word_embeddings": False}
OSS_20B = _sizes("gpt_oss", (2880, 24, 64, 8, 2880, 201088, 131072), num_local_experts=32, **OSS)
OSS_120B = _sizes("gpt_oss", (2880, 36, 64, 8, 2880, 201088, 131072), num_local_experts=128, **OSS)
DEEPSEEK = _sizes(
    "deepseek_v3", (7168, 61, 128, 128, 18432, 129280, 163840), moe_intermediate_size=2048, n_routed_experts=256
)

QWEN_BASE, QWEN_CHAT = (151643,), (151645, 151643)
OSS_ENDS = (200002, 199999, 200012)
BASE_QWEN = {"eos_token": "<|endoftext|>"}
BASE_LLAMA = {"eos_token": "<|end_of_text|>", "chat_template": None}
BASE_GEMMA = {"eos_token": "<eos>", "chat_template": None}
WITH_HARMONY = {"chat_template": HARMONY}
MODELS: Mapping[str, Model] = {
    "Qwen3-0.6B-Base": Model(package="qwen3", config=QWEN3_06B, ends=QWEN_BASE, settings=BASE_QWEN),
    "Qwen3-0.6B": Model(package="qwen3", config=QWEN3_06B, ends=QWEN_CHAT),
    "Qwen3-8B": Model(package="qwen3", config=QWEN3_8B, ends=QWEN_CHAT),
    "Qwen2.5-Math-1.5B": Model(package="qwen2_5", config=MATH_15B, ends=QWEN_BASE, settings=BASE_QWEN),
    "DeepSeek-R1-Distill-Qwen-1.5B": Model(
        package="qwen2_5", config=R1_15B, ends=QWEN_BASE, settings=R1_SETTINGS, edit=_distilled
    ),
    "DeepSeek-R1-Distill-Qwen-7B": Model(
        package="qwen2_5", config=R1_7B, ends=QWEN_BASE, settings=R1_SETTINGS, edit=_distilled
    ),
    "Meta-Llama-3-8B": Model(package="llama3", config=LLAMA3_8B, ends=(128001,), settings=BASE_LLAMA),
    "Meta-Llama-3-8B-Instruct": Model(package="llama3", config=LLAMA3_8B, ends=(128001, 128009)),
    "Llama-3.2-1B": Model(package="llama3_2", config=LLAMA32_1B, ends=(128001,), settings=BASE_LLAMA),
    "Llama-3.2-1B-Instruct": Model(package="llama3_2", config=LLAMA32_1B, ends=(128001, 128008, 128009)),
    "gemma-3-1b-pt": Model(package="gemma3", config=GEMMA_1B, ends=(1,), settings=BASE_GEMMA),
    "gemma-3-1b-it": Model(package="gemma3", config=GEMMA_1B, ends=(1, 106)),
    "gemma-3-4b-it": Model(package="gemma3", config=_gemma_4b(), ends=(1, 106)),
    "gpt-oss-20b": Model(package="gptoss", config=OSS_20B, ends=OSS_ENDS, settings=WITH_HARMONY),
    "gpt-oss-120b": Model(package="gptoss", config=OSS_120B, ends=OSS_ENDS, settings=WITH_HARMONY),
    "DeepSeek-V3": Model(package="deepseek_v3", config=DEEPSEEK, ends=(1,)),
    "DeepSeek-R1": Model(package="deepseek_v3", config=DEEPSEEK, ends=(1,), edit=_thinking),
}

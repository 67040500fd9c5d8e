"""Write docs/what-fits.md: which pairs of models fit which GPU, by the memory estimate of `opd check`.

`python -m tools.what_fits` writes the page; `--check` says whether it is current. Sizes of models are those of their published configs,
and weights are counted by transformers without being made.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from opd.config.recipe import check
from opd.config.run import RunSettings
from opd.doctor.memory import estimate, largest_microbatch
from opd.doctor.memory_checks import ERROR
from opd.doctor.model_shape import ModelShape, model_shape

PAGE = Path(__file__).parents[1] / "docs" / "what-fits.md"
GIB, MIB = 1 << 30, 1 << 20
CARDS = {"24 GB": 24564, "48 GB": 46068, "80 GB": 81559}
"""MiB that NVIDIA's driver reports for an RTX 4090, an L40S and an H100."""
CONTEXT = 1 << 30
"""Bytes left to the CUDA context and to gaps of the allocator."""
PROMPT, RESPONSE, ROLLOUTS, BATCH = 256, 1024, 64, 16


def _qwen2(
    hidden: int, layers: int, heads: int, kv: int, inner: int, *, tied: bool, rows: int = 151936
) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": inner,
        "vocab_size": rows,
        "tie_word_embeddings": tied,
    }


def _qwen3(hidden: int, layers: int, heads: int, inner: int, *, tied: bool) -> dict[str, Any]:
    base = _qwen2(hidden, layers, heads, 8, inner, tied=tied)
    return {**base, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128}


MODELS: Mapping[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": _qwen2(896, 24, 14, 2, 4864, tied=True),
    "Qwen2.5-1.5B": _qwen2(1536, 28, 12, 2, 8960, tied=True),
    "Qwen2.5-3B": _qwen2(2048, 36, 16, 2, 11008, tied=True),
    "Qwen2.5-7B": _qwen2(3584, 28, 28, 4, 18944, tied=False, rows=152064),
    "Qwen3-0.6B": _qwen3(1024, 28, 16, 3072, tied=True),
    "Qwen3-1.7B": _qwen3(2048, 28, 16, 6144, tied=True),
    "Qwen3-4B": _qwen3(2560, 36, 32, 9728, tied=True),
    "Qwen3-8B": _qwen3(4096, 36, 32, 12288, tied=False),
    "Qwen3-32B": _qwen3(5120, 64, 64, 25600, tied=False),
}
"""The sizes in the models' config.json."""
PAIRS = (
    ("Qwen2.5-0.5B", "Qwen2.5-3B"),
    ("Qwen2.5-1.5B", "Qwen2.5-7B"),
    ("Qwen3-0.6B", "Qwen3-4B"),
    ("Qwen3-1.7B", "Qwen3-8B"),
    ("Qwen3-4B", "Qwen3-8B"),
    ("Qwen3-8B", "Qwen3-32B"),
)
WAYS: Mapping[str, dict[str, Any]] = {
    "all weights": {"student": {}, "train": {"autocast": "bfloat16"}},
    "all weights, teacher behind a URL": {
        "student": {},
        "train": {"autocast": "bfloat16"},
        "teacher": {"url": ["http://x"]},
    },
    "LoRA 32": {"student": {"dtype": "bfloat16", "lora": {"rank": 32}}},
    "LoRA 32, teacher behind a URL": {
        "student": {"dtype": "bfloat16", "lora": {"rank": 32}},
        "teacher": {"url": ["http://x"]},
    },
    "QLoRA 32, teacher in 4 bits": {
        "student": {"dtype": "bfloat16", "lora": {"rank": 32}, "load_options": {"quantization": "bitsandbytes-4bit"}},
        "teacher": {"load_options": {"quantization": "bitsandbytes-4bit"}},
    },
}
"""Sections of a recipe, beside student.gradient_checkpointing=true."""
HEAD = f"""# What fits on your card

The table says which student and teacher fit one GPU together, by the estimate that `opd check` prints. A cell is the largest
`train.tokens_per_microbatch` that fits, in tokens, "whole step" where one micro-batch is enough, and a dash where nothing fits. More micro-batches change the time of a step and not
its result. `python -m tools.what_fits` writes this page.

Prompts have {PROMPT} tokens, responses at most {RESPONSE:,}, a step has {ROLLOUTS} responses, and `student.gradient_checkpointing` is on.
transformers draws {BATCH} samples at once (`rollout.batch_size`), the optimizer is AdamW, and the loss is the reverse KL over the whole vocabulary. "All weights" keeps them
in float32 and multiplies in bfloat16. A GiB is left to CUDA itself, and {ERROR:.0%} of each card for the estimate's error, which is
measured on CPUs (`benchmarks/results/memory.md`). On a GPU the estimate has not been compared yet.

For your own recipe, also for a card that you do not have yet:

<!-- not run: tests/cli/test_check_command.py runs it -->
```
opd check recipe.yaml --gpu-memory 24          # GiB of each GPU, e.g. 24,24 for two
```

| student ← teacher | what is trained | at least | {" | ".join(CARDS)} |
|---|---|---:|{"---:|" * len(CARDS)}
"""


RECIPES: Mapping[str, Mapping[str, str]] = {
    "gsm8k": {"student": "Qwen2.5-0.5B", "teacher": "Qwen2.5-3B"},
    "deepscaler": {"student": "Qwen3-1.7B", "teacher": "Qwen3-4B"},
    "math-lora": {"student": "Qwen3-8B"},
    "self-distillation": {"student": "Qwen3-4B"},
    "two-teachers": {"student": "Qwen2.5-0.5B", "teachers.math": "Qwen2.5-1.5B", "teachers.code": "Qwen2.5-1.5B"},
    "countdown": {"student": "Qwen2.5-1.5B", "teacher": "Qwen3-4B"},
    "recovery": {"student": "Qwen3-8B", "teacher": "Qwen3-8B"},
}
"""Models of published recipes that are on their student's GPU, by section."""
RECIPES_HEAD = f"""
The published recipes, as they are, with prompts of {PROMPT} tokens and one GPU. vLLM, where a recipe samples with it, takes its own share
beside that. `three-experts` is missing, because the estimate does not know the layers of Qwen3.5.

| recipe | needs | in the phase that needs most, GiB |
|---|---:|---|"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    pair: str
    way: str
    least: int
    """Bytes with one sequence in a micro-batch."""
    largest: tuple[int | None, ...]
    """Tokens of the largest micro-batch, by card."""

    def __str__(self) -> str:
        whole = ROLLOUTS * (PROMPT + RESPONSE - 1)
        words = {None: "—", whole: "whole step"}
        cells = " | ".join(words.get(tokens) or f"{tokens:,}" for tokens in self.largest)
        return f"| {self.pair} | {self.way} | {self.least / GIB:.0f} GiB | {cells} |"


@cache
def shape(name: str) -> ModelShape:
    """Sizes of one of MODELS."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[name]))
        return model_shape(folder, "model")


def settings(way: Mapping[str, Any], tokens: int) -> RunSettings:
    """A recipe of this way to train, with so many tokens in a micro-batch."""
    teacher = {"model": "teacher", **way.get("teacher", {})}
    objective = {"support": "teacher_top_k", "top_k": 64, "tail": "sampled"} if "url" in teacher else {}
    return check(
        {
            "student": {"model": "student", "gradient_checkpointing": True, **way["student"]},
            "teacher": teacher,
            "prompts": {"path": "prompts.jsonl"},
            "objective": objective,
            "rollout": {"max_new_tokens": RESPONSE, "batch_size": BATCH},
            "train": {
                "prompts_per_step": ROLLOUTS,
                "samples_per_prompt": 1,
                "tokens_per_microbatch": tokens,
                **way.get("train", {}),
            },
            "eval": {"every": 0},
        }
    )


def row(student: str, teacher: str, way: str) -> Row:
    """The line of one pair."""
    shapes = {"student": shape(student), "teacher": shape(teacher)}
    recipe = settings(WAYS[way], 1)
    least = estimate(recipe, shapes, PROMPT, gpus=1)["cuda:0"].peak
    largest = tuple(
        largest_microbatch(recipe, shapes, PROMPT, {"cuda:0": int((mib * MIB - CONTEXT) * (1 - ERROR))}, gpus=1)
        for mib in CARDS.values()
    )
    return Row(pair=f"{student} ← {teacher}", way=way, least=least, largest=largest)


def recipe_line(name: str) -> str:
    """The line of one of RECIPES: its estimate on one GPU, without what runs elsewhere."""
    models = RECIPES[name]
    words = yaml.safe_load((PAGE.parents[1] / "recipes" / name / "recipe.yaml").read_text())
    found = estimate(check(words), {key: shape(model) for key, model in models.items()}, PROMPT, gpus=1)["cuda:0"]
    most = sorted({**found.always, **found.phases[found.phase]}.items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{part} {size / GIB:.1f}" for part, size in most)
    return f"| `recipes/{name}` | {found.peak / GIB:.0f} GiB | {found.phase}: {parts} |"


def page() -> str:
    """The whole page."""
    lines = [str(row(*pair, way)) for pair in PAIRS for way in WAYS]
    lines += [RECIPES_HEAD, *(recipe_line(name) for name in RECIPES)]
    return HEAD + "".join(f"{line}\n" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="say whether the page is current, and change nothing")
    wanted, made = parser.parse_args(argv), page()
    if not wanted.check:
        PAGE.write_text(made)
        return 0
    if PAGE.exists() and PAGE.read_text() == made:
        return 0
    print(f"{PAGE} is not what the estimate says now; run python -m tools.what_fits.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

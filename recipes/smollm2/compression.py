"""A model in 4 bits learns from its full-precision self, on its own samples.

`make smollm2`, `pip install torchao`, then `python recipes/smollm2/compression.py [MODEL] [FOLDER]`. MODEL is a folder or a hub name, by
default what `make smollm2` has made; FOLDER gets the student, whose linear layers hold 4-bit numbers times one scale per row.

Values: benchmarks/real/compression, where the learning rate is the best of its grid. Published: no. Measured here: not yet.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from torchao.quantization import IntxWeightOnlyConfig, PerAxis, quantize_
from torchao.quantization.qat import QATConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import opd

MODEL = Path.home() / ".cache" / "opd-models" / "SmolLM2-135M-Instruct"
FORMAT = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0))
TOPICS = (
    "bread, bicycles, the moon, volcanoes, tea, chess, gardening, the piano, whales, rivers, snow, maps, sleep, honey"
)
ASK = ("Explain {} to a child.", "Give me three facts about {}.", "What should a beginner know about {}?")
SETTINGS = {
    "rollout": {"max_new_tokens": 32},
    "train": {"steps": 20, "prompts_per_step": 16, "samples_per_prompt": 1},
    "optimizer": {"lr": 1e-4, "schedule": "cosine"},
}


def in_a_block(module: torch.nn.Module, name: str) -> bool:
    """Embeddings and output layer stay as they are."""
    return isinstance(module, torch.nn.Linear) and ".layers." in name


def as_rounded(model: torch.nn.Module) -> torch.nn.Module:
    """An ordinary model that computes what the fake-quantised one does. A student that is saved without this has the weights before
    rounding."""
    quantize_(model, QATConfig(FORMAT, step="convert"), filter_fn=in_a_block)
    for name, module in model.named_modules():
        if in_a_block(module, name):
            module.weight = torch.nn.Parameter(module.weight.dequantize())
    return model


def main(model: str, folder: str, **settings: object) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    teacher = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    student = copy.deepcopy(teacher)
    quantize_(student, QATConfig(FORMAT, step="prepare"), filter_fn=in_a_block)  # every pass sees rounded weights
    rows = [{"prompt": [{"role": "user", "content": ask.format(t)}]} for t in TOPICS.split(", ") for ask in ASK]
    run = opd.Distiller(
        student=(student, tokenizer), teacher=(teacher, tokenizer), prompts=rows, run_dir=f"{folder}-run", eval={"every": 0},
        **{**SETTINGS, **settings},
    ).train(overwrite=True)  # fmt: skip
    steps = [record.metrics["reverse_kl"] for record in run.metrics if record.kind == "step"]
    print(json.dumps({"reverse KL of the first step and of the last": [round(steps[0], 3), round(steps[-1], 3)]}))
    as_rounded(run.student).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(*map(str, [*sys.argv[1:], MODEL, "runs/compression-student"][:2]))

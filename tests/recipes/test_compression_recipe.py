"""The script of recipes/smollm2 saves a student whose blocks hold 4-bit numbers, with a tiny model in place of SmolLM2."""

import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from opd.testing import byte_tokenizer, save_model, tiny_causal_lm

SCRIPT = Path(__file__).parents[2] / "recipes" / "smollm2" / "compression.py"
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
SMALL = {"train": {"steps": 2, "prompts_per_step": 2}, "rollout": {"max_new_tokens": 4}, "log": {"progress": "off"}}

pytestmark = pytest.mark.timeout(300)


def test_the_saved_student_has_at_most_16_values_in_every_row_of_its_blocks(tmp_path: Path):
    pytest.importorskip("torchao")
    tokenizer = byte_tokenizer(chat_template=TEMPLATE)
    model = save_model(tiny_causal_lm(tokenizer, initializer_range=0.2), tokenizer, tmp_path / "model")
    runpy.run_path(str(SCRIPT))["main"](model, str(tmp_path / "student"), **SMALL)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    layers = [m for name, m in student.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in name]
    assert len(layers) == 14
    assert all(len(row.unique()) <= 16 for layer in layers for row in layer.weight)
    head = student.get_output_embeddings().weight
    assert len(head[0].unique()) > 16

"""`opd check`: what it finds in recipes for tiny real models, its exit code, and that it imports no torch."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from opd.config.recipe import check
from opd.config.words import merge
from opd.doctor.model_shape import model_shape
from opd.doctor.quick import MARKS, examine
from opd.testing import byte_tokenizer, digit_tokenizer, save_model, tiny_causal_lm

MAX_CPU_S = 4.0  # 1.4 on an idle machine; with torch 5 and more
TIMEOUT_S = 120
WATCHED = """
import sys
from opd.cli.main import main
code = main(sys.argv[1:])
print("code", code, "torch" if sys.modules.get("torch") else "")
"""
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
SIZES = {"hidden": 32, "layers": 1, "max_positions": 64}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits: student, teacher. Bytes: chat, and thinking, whose template opens a thought. Prompts as text and as messages."""
    folder = tmp_path_factory.mktemp("desk")
    digits = digit_tokenizer()
    for name, seed in (("student", 1), ("teacher", 2)):
        save_model(tiny_causal_lm(digits, seed=seed, **SIZES), digits, folder / name)
    for name, template in (("chat", TEMPLATE), ("thinking", TEMPLATE.replace("<assistant>{%", "<assistant><think>{%"))):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
        save_model(tiny_causal_lm(tokenizer, **SIZES), tokenizer, folder / name)
    texts = [{"prompt": f"{i}>", "answer": str(i)} for i in range(20)]
    chats = [{"prompt": [{"role": "user", "content": f"{i} + 1?"}], "answer": str(i + 1)} for i in range(20)]
    for name, rows in (("texts", texts), ("chats", chats)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(desk: Path, student: str, teacher: str, prompts: str, **more: object) -> dict[str, Any]:
    """Settings as nested mappings; `more` uses __ for the dots."""
    path = str(desk / f"{prompts}.jsonl")
    plain = {
        "student": {"model": str(desk / student)},
        "teacher": {"model": str(desk / teacher)},
        "prompts": {"path": path, "eval_path": path},
        "rollout": {"max_new_tokens": 6},
    }
    return merge(plain, {key.replace("__", "."): value for key, value in more.items()})


@dataclass(frozen=True)
class Answer:
    code: int
    torch: bool
    out: str
    err: str
    cpu_s: float


def asked(folder: Path, data: Mapping[str, Any], *words: str) -> Answer:
    """`opd check` in a process of its own."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(dict(data)))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, "check", str(folder / "recipe.yaml"), *words],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    *out, last = done.stdout.splitlines()
    _, code, *heavy = last.split()
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Answer(int(code), bool(heavy), "\n".join(out), done.stderr, used)


def texts_of(data: Mapping[str, Any], level: str) -> list[str]:
    return [f"{one.name}: {one.seen}" for one in examine(check(data)).checks if one.verdict == level]


def test_a_healthy_recipe_is_green_without_torch(desk: Path, tmp_path: Path):
    answer = asked(tmp_path, recipe(desk, "student", "teacher", "texts"))
    assert (answer.code, answer.torch, answer.err) == (0, False, "")
    assert answer.out.splitlines()[-1] == "green"
    assert "student and teacher share 13 token ids" in answer.out
    assert "prompt 1, as every model reads it:" in answer.out and "│ 1>" in answer.out
    assert answer.cpu_s < MAX_CPU_S


def test_templates_that_differ_are_yellow_and_the_difference_is_marked(desk: Path, tmp_path: Path):
    answer = asked(tmp_path, recipe(desk, "chat", "thinking", "chats", rollout__max_new_tokens=8))
    assert (answer.code, answer.torch) == (1, False)
    assert "student and teacher read prompts that end differently" in answer.out
    assert "│ <user>0 + 1?<assistant>⟦⟧" in answer.out
    assert "│ <user>0 + 1?<assistant>⟦<think>⟧" in answer.out
    assert answer.out.splitlines()[-1] == "yellow"


def test_a_misspelt_key_is_red(desk: Path, tmp_path: Path):
    answer = asked(tmp_path, recipe(desk, "student", "teacher", "texts"), "--train.step", "3")
    assert (answer.code, answer.torch) == (2, False)
    assert "error: Unknown key 'train.step'. Did you mean 'train.steps'?" in answer.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"prompts__prompt_column": "question"}, "prompts: line 1 of"),
        ({"prompts__path": "nowhere.jsonl"}, "files: the prompt file nowhere.jsonl does not exist"),
        ({"student__model": "./nowhere"}, "files: There is no folder './nowhere'."),
        (
            {"rollout__max_new_tokens": 63},
            "length: prompt 10 has 3 tokens; with max_new_tokens=63 that is 66, but the context",
        ),
    ],
    ids=["column", "file", "folder", "length"],
)
def test_what_a_run_would_refuse_is_red(desk: Path, more: dict[str, object], said: str):
    red = texts_of(recipe(desk, "student", "teacher", "texts", **more), "red")
    assert len(red) == 1 and red[0].startswith(said), red


def test_a_response_that_just_fits_is_green(desk: Path):
    """3 tokens and 61 are the 64 of the context; the case above has one too many for the longest prompt alone."""
    assert not texts_of(recipe(desk, "student", "teacher", "texts", rollout__max_new_tokens=61), "red")


def test_models_with_other_tokens_are_red(desk: Path):
    red = texts_of(recipe(desk, "student", "chat", "texts"), "red")
    assert len(red) == 1 and red[0].startswith("vocabulary: student") and "do not read the same token ids" in red[0]


def test_one_refusal_does_not_hide_another(desk: Path, tmp_path: Path):
    wrong = recipe(desk, "student", "chat", "texts", prompts__prompt_column="question")
    answer = asked(tmp_path, wrong)
    assert (answer.code, answer.out.splitlines()[-1], answer.torch) == (2, "red", False)
    assert [text.split(":")[0] for text in texts_of(wrong, "red")] == ["prompts", "vocabulary"]


def test_notices_of_a_run_are_yellow(desk: Path):
    data = recipe(desk, "student", "teacher", "texts", prompts__eval_path=None)
    assert any("prompts.eval_path is not set" in text for text in texts_of(data, "yellow"))


def test_the_prompt_that_only_one_model_reads_is_between_marks(desk: Path):
    shown = examine(check(recipe(desk, "chat", "thinking", "chats"))).rendered
    assert [(one.prompt, one.role) for one in shown] == [(0, "student"), (0, "teacher"), (1, "student"), (1, "teacher")]
    bare = [one.text.replace(MARKS[0], "").replace(MARKS[1], "") for one in shown]
    assert bare[:2] == ["<user>0 + 1?<assistant>", "<user>0 + 1?<assistant><think>"]


@pytest.mark.parametrize("name", ["student", "chat"])
def test_the_size_from_the_files_is_that_of_the_model_and_of_the_meta_device(desk: Path, tmp_path: Path, name: str):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(desk / name)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    read = model_shape(str(desk / name), "student")
    (tmp_path / "config.json").write_bytes((desk / name / "config.json").read_bytes())
    counted = model_shape(str(tmp_path), "student")
    assert read.weights == counted.weights == shapes
    assert read.parameters == sum(p.numel() for p in model.parameters())
    assert read.stored_bytes == 4 * read.parameters and counted.stored_bytes == 0
    assert (read.layers, read.hidden, read.kv_heads, read.head_dim, read.intermediate) == (1, 32, 2, 8, 64)
    assert read.normed_heads and read.gated


def test_a_head_that_is_stored_and_tied_counts_once(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    model = tiny_causal_lm(13, **SIZES)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    save_file({**stored, "lm_head.weight": torch.zeros(13, 32)}, tmp_path / "model.safetensors")
    assert model_shape(str(tmp_path), "student").parameters == sum(p.numel() for p in model.parameters())


def test_a_gpu_that_is_not_here_can_be_asked_about(desk: Path, tmp_path: Path):
    answer = asked(tmp_path, recipe(desk, "student", "teacher", "texts"), "--gpu-memory", "24")
    assert answer.code == 0
    assert "memory      cuda:0 needs about" in answer.out and "of 24.00 GiB" in answer.out


def test_a_run_that_such_a_gpu_cannot_hold_is_red(desk: Path, tmp_path: Path):
    answer = asked(tmp_path, recipe(desk, "student", "teacher", "texts"), "--gpu-memory=0.0001")
    assert answer.code == 2 and "red     memory      cuda:0 needs" in answer.out


@pytest.mark.parametrize("given", ["", "80GB", "24,", "0", "-1", "nan"])
def test_what_is_no_gpu_memory_is_refused(desk: Path, tmp_path: Path, given: str):
    answer = asked(tmp_path, recipe(desk, "student", "teacher", "texts"), "--gpu-memory", given)
    assert answer.code == 2 and "write one number for each" in answer.err


def test_an_adapter_has_the_size_of_its_base_and_its_own(desk: Path, tmp_path: Path):
    peft = pytest.importorskip("peft")
    model = tiny_causal_lm(13, **SIZES)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    own = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    file = tmp_path / "adapter" / "adapter_config.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps({**facts, "base_model_name_or_path": str(desk / "teacher")}))
    data = recipe(desk, "student", str(tmp_path / "adapter"), "texts")
    (said,) = [text for text in texts_of(data, "green") if text.startswith("size: teacher")]
    assert f"an adapter of {own / 1000:.1f}k parameters on '{desk / 'teacher'}', which has 9.7k parameters" in said
    assert asked(tmp_path, data).torch is False
    file.write_text(json.dumps({**facts, "base_model_name_or_path": "./gone"}))
    assert any("is an adapter of './gone'" in text for text in texts_of(data, "red"))

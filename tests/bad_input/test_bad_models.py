"""Models and tokenizers that are missing, damaged, or do not go together."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from opd_user import User
from safetensors.torch import load_file, save_file

from opd.testing import byte_tokenizer, digit_tokenizer, tiny_causal_lm

SMALL = {"layers": 1, "hidden": 16, "heads": 2, "kv_heads": 1, "max_positions": 64}


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/at/all", "runs/demo/nowhere", r"C:\Users\me\model", "D:/nowhere"]
)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_missing_model_folder_is_named(user: User, role: str, name: str):
    user.train(**{f"{role}__model": name}).refuses(f"no folder '{name}'", f"Give {role}.model a model's folder")


def test_a_hub_name_that_cannot_be_reached_is_named(user: User):
    outcome = user.train(student__model="no-such-owner/no-such-model")
    outcome.refuses("student's tokenizer 'no-such-owner/no-such-model' cannot be loaded", "a hub name this machine can")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (lambda d: (d / "config.json").write_text("{not json"), "is not a valid JSON file"),
        (lambda d: (d / "config.json").write_text('{"model_type": "unheard_of"}'), "model type `unheard_of`"),
        (lambda d: _edit(d / "config.json", hidden_size=32), "'"),
        (lambda d: (d / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda d: _cut(d / "model.safetensors"), "SafetensorError"),
        (lambda d: [f.unlink() for f in d.glob("tokenizer*")], "has no tokenizer"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "KeyError"),
    ],
    ids=["no config", "broken config", "unknown type", "other sizes", "no weights", "cut weights", "no tokenizer", "broken tokenizer", "empty tokenizer"],
)  # fmt: skip
def test_a_damaged_model_folder_is_refused_with_what_it_should_hold(user: User, damage, what: str):
    folder = user.copies(user.desk.student, "damaged")
    damage(folder)
    user.train(student__model=folder).refuses(
        str(folder), what, "Give student.model a folder that holds config.json, weights and tokenizer"
    )


def test_weights_that_are_not_in_the_file_are_not_made_up(user: User):
    folder = user.copies(user.desk.student, "incomplete")
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    outcome = user.train(student__model=folder)
    outcome.refuses("lacks 1 of its weights", "up_proj", "would be random", "get the whole folder again")


def test_an_empty_folder_is_not_a_model(user: User):
    (user.folder / "empty").mkdir()
    user.train(student__model=user.folder / "empty").refuses("has no config.json", "Give student.model a folder")


def test_a_student_without_an_end_of_sequence_token_is_refused(user: User):
    tokenizer = digit_tokenizer()
    tokenizer.eos_token = None
    model = tiny_causal_lm(tokenizer, **SMALL)
    outcome = user.train(student__model=user.saves("endless", model, tokenizer))
    outcome.refuses("EOS token", "no response would ever end", "set eos_token_id in generation_config.json")


def test_incompatible_vocabularies_show_where_they_part(user: User):
    tokenizer = byte_tokenizer()
    teacher = user.saves("bytes", tiny_causal_lm(tokenizer, **SMALL), tokenizer)
    outcome = user.train(teacher__model=teacher)
    outcome.refuses("do not read the same token ids", "0 is '0' to the student", "use a student and a teacher of one")


def test_a_student_token_that_the_teacher_lacks_is_named(user: User):
    tokenizer = digit_tokenizer(extra="+")
    student = user.saves("plus", tiny_causal_lm(tokenizer, **SMALL), tokenizer)
    user.train(student__model=student).refuses("token ids", "'+'", "one tokenizer")


@pytest.mark.parametrize("device", ["gpu", "meta", "mps", "cuda:99"])
def test_a_device_this_machine_lacks_is_refused(user: User, device: str):
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    user.train(student__device=device).refuses(f"'{device}'", "cpu" if device != "cuda:99" else "cuda")


def test_lora_without_peft_says_what_to_install(user: User, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    user.train(student__lora__rank=2).refuses("student.lora needs peft", "not installed", "pip install 'opd[peft]'")


def test_lora_on_modules_that_are_not_there_is_refused(user: User):
    pytest.importorskip("peft")
    outcome = user.train(student__lora__target_modules="qq_proj")
    outcome.refuses("student.lora.target_modules='qq_proj'", "not found in the base model", "all-linear")


def test_an_attention_that_cannot_run_is_named(user: User):
    user.train(student__attn_implementation="nope").refuses('attn_implementation="nope"', "not supported", "eager")


def _with(folder: Path, value: float) -> Path:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 2] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_with_nan_in_its_weights_is_refused_and_costs_no_old_run(user: User, role: str, value: float):
    before = user.has_finished_run()
    folder = _with(user.copies(user.desk.student, "sick"), value)
    outcome = user.train("--overwrite", **{f"{role}__model": folder})
    outcome.refuses(f"The {role}", "NaN or infinite numbers in", "up_proj", "use another checkpoint")
    assert user.files() == before

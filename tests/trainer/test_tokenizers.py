"""The tokenizer that a model came with is the one that its prompts go through, and the one that its student takes along."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd.config.recipe import build, merge
from opd.data.rendering import Renderer, byte_alphabet
from opd.doctor.reading import check_text
from opd.errors import ModelError
from opd.testing import CHAT_TEMPLATE, byte_tokenizer, save_model, tiny_causal_lm
from opd.tokenizer import load_tokenizer
from opd.trainer.from_config import RunComponents
from opd.trainer.lifecycle import save_student
from opd.trainer.run import train
from opd.trainer.run_folder import RunFolder
from opd.types import Prompt
from worlds import settings

TEXT = "Solve: 12 + 345  =?\n\tשלום é 🙂"
SMALL = {"layers": 1, "hidden": 16, "heads": 2, "kv_heads": 1, "max_positions": 128, "architecture": "llama"}


def byte_level() -> Tokenizer:
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(byte_alphabet())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def single_digits() -> Tokenizer:
    """As SmolLM2's: "12" and "34" are tokens, and numbers are cut into digits before they could be used."""
    vocab = {c: i for i, c in enumerate([*byte_alphabet(), "12", "34"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("1", "2"), ("3", "4")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def sentence_piece() -> Tokenizer:
    """As Llama 2's: spaces are ▁, and what has no token of its own is bytes."""
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"Solve:12+345=?"]
    backend = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(dict.fromkeys(pieces))}, merges=[], byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def composed() -> Tokenizer:
    backend = byte_level()
    backend.normalizer = normalizers.NFC()
    return backend


def folder_of(
    backend: Tokenizer, folder: Path, tokenizer_class: str, chat_template: str | None = CHAT_TEMPLATE
) -> Path:
    backend.add_special_tokens(["<pad>", "<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = chat_template
    save_model(tiny_causal_lm(tokenizer, **SMALL), tokenizer, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": tokenizer_class}))
    return folder


CLASSES = [
    "LlamaTokenizerFast",
    "GPT2Tokenizer",
    "Qwen2TokenizerFast",
    "GemmaTokenizerFast",
    "CohereTokenizerFast",
    "GPTNeoXTokenizerFast",
    "PreTrainedTokenizerFast",
]


@pytest.mark.parametrize("tokenizer_class", CLASSES)
@pytest.mark.parametrize("make", [byte_level, single_digits, sentence_piece, composed])
def test_a_tokenizer_json_is_read_as_it_is_under_every_tokenizer_class(
    tmp_path: Path, make: Callable[[], Tokenizer], tokenizer_class: str
):
    folder = folder_of(make(), tmp_path / "model", tokenizer_class)
    filed, loaded = Tokenizer.from_file(str(folder / "tokenizer.json")), load_tokenizer(str(folder))
    assert loaded(TEXT, add_special_tokens=False)["input_ids"] == filed.encode(TEXT, add_special_tokens=False).ids
    assert loaded.get_vocab() == filed.get_vocab()
    back = Renderer(loaded, name="m").decode(loaded(TEXT, add_special_tokens=False)["input_ids"])
    assert back == (unicodedata.normalize("NFC", TEXT) if make is composed else TEXT)
    assert (loaded.eos_token, loaded.pad_token, loaded.chat_template) == ("<eos>", "<pad>", CHAT_TEMPLATE)


def test_special_tokens_that_only_the_class_knows_stay_where_the_file_has_them(tmp_path: Path):
    backend = byte_level()
    backend.add_special_tokens(["<s>", "</s>"])
    folder = folder_of(backend, tmp_path / "model", "LlamaTokenizerFast")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(str(folder))
    assert (loaded.bos_token, loaded.eos_token, loaded.unk_token) == ("<s>", "</s>", None)
    assert "<unk>" not in loaded.get_vocab()


# --- what the student takes along -------------------------------------------------------------------------------------


def recipe(tmp_path: Path, student: Path, teacher: Path, **more: object) -> dict[str, object]:
    rows = [{"prompt": [{"role": "user", "content": TEXT}], "answer": "1"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = settings(tmp_path, tmp_path / "run", train__steps=1, eval__every=0, checkpoint__every=0, **more)
    return values | {"student.model": str(student), "teacher.model": str(teacher), "prompts.eval_path": None}


OWN = {
    "special_tokens_map.json": '{"eos_token": "<eos>"}',
    "added_tokens.json": "{}",
    "merges.txt": "#version: 0.2",
    "tokenizer.model": "not read",
    "preprocessor_config.json": "{}",
    "video_preprocessor_config.json": "{}",
    "additional_chat_templates/rag.jinja": "{{ messages }}",
}


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizerFast", "GPT2Tokenizer"])
def test_a_student_has_the_tokenizer_files_of_its_model_unchanged(tmp_path: Path, tokenizer_class: str):
    model = folder_of(single_digits(), tmp_path / "model", tokenizer_class)
    for name, content in OWN.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(content)
    train(build(merge({}, recipe(tmp_path, model, model))))
    student = tmp_path / "run" / "student"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", *OWN):
        assert (student / name).read_bytes() == (model / name).read_bytes(), name
    weights = ("config.json", "generation_config.json", "model.safetensors", "README.md")
    files = {str(file.relative_to(student)) for file in student.rglob("*") if file.is_file()}
    assert files == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", *OWN, *weights}
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert TEXT in sample["prompt"]


def test_a_model_folder_that_goes_away_during_the_run_costs_nothing(tmp_path: Path):
    model = folder_of(byte_level(), tmp_path / "model", "GPT2Tokenizer")
    files = {file.name: file.read_bytes() for file in model.glob("tokenizer*")}
    parts = RunComponents(build(merge({}, recipe(tmp_path, model, model))))
    shutil.rmtree(model)
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    save_student(parts, run)
    assert files and all((run.student / name).read_bytes() == content for name, content in files.items())


HUB_USER = """
import sys
from opd.tokenizer import load_tokenizer, own_files
tokenizer = load_tokenizer("some/model")
print(tokenizer("2 + 2")["input_ids"], sorted(own_files("some/model", tokenizer, revision=None, code=False)))
"""


@pytest.mark.slow
def test_files_of_a_hub_model_are_found_in_the_cache(tmp_path: Path):
    hub = tmp_path / "hub" / "models--some--model"
    folder_of(byte_level(), hub / "snapshots" / "0a1b", "LlamaTokenizerFast")
    (hub / "snapshots" / "0a1b" / "processor_config.json").write_text("{}")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0a1b")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", HUB_USER], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    names = ["chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert done.stdout.strip() == f"{list(b'2 + 2')} {names}"


# --- text in, text out ------------------------------------------------------------------------------------------------


def spaceless() -> Tokenizer:
    """What transformers made of a byte-level tokenizer, and wrote down: no file tells any more what it was."""
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return backend


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_tokenizer_that_loses_the_prompts_is_refused_on_either_side(tmp_path: Path, role: str):
    good = folder_of(byte_level(), tmp_path / "good", "PreTrainedTokenizerFast")
    bad = folder_of(spaceless(), tmp_path / "bad", "PreTrainedTokenizerFast")
    sides = {"student": (bad, good), "teacher": (good, bad)}[role]
    with pytest.raises(
        ModelError,
        match=rf"(?s){role} .*loses \d+% of the prompts' characters.*'Solve: 12 .*comes back as.*{role}\.model",
    ):
        RunComponents(build(merge({}, recipe(tmp_path, *sides))))


def test_a_vocabulary_that_the_tokenizer_class_never_reads_is_refused_for_what_it_loses(tmp_path: Path):
    """Without a tokenizer.json transformers makes an empty tokenizer of some classes, and says nothing."""
    folder = folder_of(byte_level(), tmp_path / "m", "LlamaTokenizerFast")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(byte_alphabet())}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(
        ModelError, match=r"student .* loses 100% of the prompts' characters .*student.model.*tokenizer.json"
    ):
        RunComponents(build(merge({}, recipe(tmp_path, folder, folder))))


def test_text_that_comes_back_changed_is_shown_and_a_normal_form_is_not():
    def notices(backend: Tokenizer, *texts: str) -> list[str]:
        renderer = Renderer(PreTrainedTokenizerFast(tokenizer_object=backend), name="student 'm'")
        return check_text(renderer, "student", [Prompt(index=i, text=text) for i, text in enumerate(texts)])

    assert notices(composed(), "e\u0301", "plain") == []
    assert notices(byte_tokenizer().backend_tokenizer, TEXT) == []
    lower = byte_level()
    lower.normalizer = normalizers.Lowercase()
    (notice,) = notices(lower, "all small", "How Many")
    assert "does not give 1 of the texts back" in notice and "prompt 1: 'How Many' comes back as 'how many'" in notice
    few = Tokenizer(models.WordLevel({**{c: i for i, c in enumerate("abcdefghij klmnopqrst")}, "?": 99}, unk_token="?"))
    few.pre_tokenizer, few.decoder = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), decoders.Fuse()
    (notice,) = notices(few, "a bad cab " * 5 + "☂")
    assert "☂" in notice and "comes back as" in notice
    with pytest.raises(ModelError, match=r"student 'm' loses 100% of the prompts' characters"):
        notices(few, "☂☃☄")

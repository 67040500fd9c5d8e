"""`opd check` says the expected lines about well-known pairs of models: real tokenizers and templates, published sizes, no weights.

The expected lines are in real_pairs/, one file for each pair. test_real_renderings.py holds the prompts in them against literals of the
published formats. REWRITE_REAL_PAIRS=1 writes them again. `make
tokenizers` fetches the tokenizers; without them these tests are skipped, and with OPD_REAL_TOKENIZERS=required they fail.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tools.real_tokenizers import default_folder, is_ready

from opd.config.recipe import check
from opd.config.words import merge
from opd.doctor.check import Check
from opd.doctor.quick import Examined, examine
from opd.tokenizer import load_tokenizer

EXPECTED = Path(__file__).with_name("real_pairs")
FOLDER = default_folder()
OFF: Mapping[str, object] = {"enable_thinking": False}
PAIRS: Mapping[str, tuple[str, str, str, Mapping[str, object]]] = {
    "qwen3_base_chats": ("Qwen3-0.6B-Base", "Qwen3-8B", "chats", {}),
    "qwen3_both_think": ("Qwen3-0.6B", "Qwen3-8B", "chats", {}),
    "qwen3_teacher_thinks": ("Qwen3-0.6B", "Qwen3-8B", "chats", {"student.chat_template_kwargs": OFF}),
    "qwen3_none_thinks": (
        "Qwen3-0.6B",
        "Qwen3-8B",
        "chats",
        {"student.chat_template_kwargs": OFF, "teacher.chat_template_kwargs": OFF},
    ),
    "llama3_base_chats": ("Meta-Llama-3-8B", "Meta-Llama-3-8B-Instruct", "chats", {}),
    "llama3_base_texts": ("Meta-Llama-3-8B", "Meta-Llama-3-8B-Instruct", "texts", {}),
    "llama32_base_texts": ("Llama-3.2-1B", "Llama-3.2-1B-Instruct", "texts", {}),
    "llama32_from_llama3": ("Llama-3.2-1B-Instruct", "Meta-Llama-3-8B-Instruct", "chats", {}),
    "gemma3": ("gemma-3-1b-it", "gemma-3-4b-it", "chats", {}),
    "gemma3_base_texts": ("gemma-3-1b-pt", "gemma-3-1b-it", "texts", {}),
    "gpt_oss": ("gpt-oss-20b", "gpt-oss-120b", "chats", {}),
    "deepseek_v3_from_r1": ("DeepSeek-V3", "DeepSeek-R1", "chats", {}),
    "deepseek_v3_texts": ("DeepSeek-V3", "DeepSeek-R1", "texts", {}),
    "r1_distill_qwen": ("DeepSeek-R1-Distill-Qwen-1.5B", "DeepSeek-R1-Distill-Qwen-7B", "chats", {}),
    "qwen25_from_r1_distill": ("Qwen2.5-Math-1.5B", "DeepSeek-R1-Distill-Qwen-7B", "chats", {}),
    "qwen3_from_llama3": ("Qwen3-0.6B", "Meta-Llama-3-8B-Instruct", "chats", {}),
}
"""Student, teacher, kind of prompts, and further keys."""

pytestmark = pytest.mark.timeout(120)


@contextmanager
def loaded_once() -> Iterator[None]:
    """Each tokenizer is loaded once, and once for all sizes of a family: it takes seconds."""
    loaded: dict[str, Any] = {}

    def load(name: str, **options: Any) -> Any:
        files = [Path(name, file) for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")]
        kind = json.loads(Path(name, "config.json").read_text())["model_type"]
        parts = [file.read_bytes() for file in files if file.exists()]
        key = f"{kind} {hashlib.blake2b(b' | '.join(parts)).hexdigest()}"
        if key not in loaded:
            loaded[key] = load_tokenizer(name, **options)
        return loaded[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("opd.tokenizer.load_tokenizer", load)
        yield


@pytest.fixture(scope="module", autouse=True)
def _folders() -> Iterator[None]:
    if is_ready(FOLDER):
        with loaded_once():
            yield
        return
    said = f"no real tokenizers in {FOLDER}: `make tokenizers` fetches them"
    if os.environ.get("OPD_REAL_TOKENIZERS") == "required":
        pytest.fail(said)
    pytest.skip(said)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    question = "What is 1 + 2?"
    rows = {"chats": [{"role": "user", "content": question}], "texts": f"Question: {question}\nAnswer:"}
    rows["with_bos"] = "<|begin_of_text|>" + str(rows["texts"])
    for name, prompt in rows.items():
        (folder / f"{name}.jsonl").write_text(json.dumps({"prompt": prompt, "answer": "3"}) + "\n")
    return folder


def look(student: Path | str, teacher: Path | str, path: Path, **more: object) -> Examined:
    plain: dict[str, Any] = {
        "student": {"model": str(FOLDER / student)},
        "teacher": {"model": str(FOLDER / teacher)},
        "prompts": {"path": str(path)},
        "eval": {"every": 0},
        "rollout": {"max_new_tokens": 512},
    }
    return examine(check(merge(plain, {key.replace("__", "."): value for key, value in more.items()})))


def found(examined: Examined, name: str, verdict: str = "yellow") -> list[str]:
    return [one.seen for one in examined.checks if (one.name, one.verdict) == (name, verdict)]


def lines(examined: Examined) -> str:
    """The report without what changes: the memory of this machine, folders and today's date."""

    def line(one: Check) -> str:
        return f"{one.verdict:<6}  {one.name:<10}  {one.seen}"

    checks = [line(one) for one in examined.checks if one.name not in ("memory", "recipe", "prompts")]
    shown = [f"{one.role} reads {one.text!r}" for one in examined.rendered]
    text = "\n".join([*checks, *shown]).replace(f"{FOLDER}/", "")
    for layout in ("%d %b %Y", "%Y-%m-%d"):
        text = text.replace(datetime.now().strftime(layout), "TODAY")
    return text + "\n"


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_gets_the_lines_that_are_expected(name: str, prompts: Path):
    student, teacher, kind, more = PAIRS[name]
    said = lines(look(student, teacher, prompts / f"{kind}.jsonl", **more))
    file = EXPECTED / f"{name}.txt"
    if os.environ.get("REWRITE_REAL_PAIRS"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(said, encoding="utf-8")
    assert said == file.read_text(encoding="utf-8")


# --- the advice, followed to the letter ---------------------------------------------------------------------------------


def copy_of(name: str, folder: Path, **contents: object) -> Path:
    """A copy of a model's folder; `contents` replace files, whose names have _dot_ for the dot."""
    folder.mkdir()
    for file in (FOLDER / name).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for file, content in contents.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / file.replace("_dot_", ".")).write_text(text, encoding="utf-8")
    return folder


def test_ends_written_as_advised_are_no_warning_any_more(prompts: Path, tmp_path: Path):
    path = prompts / "texts.jsonl"
    (said,) = found(look("Qwen3-0.6B-Base", "Qwen3-8B", path), "vocabulary")
    advised = re.search(r"\"eos_token_id\": (\[[\d, ]+\])", said)
    assert advised is not None
    ends = {"eos_token_id": json.loads(advised.group(1))}
    mended = copy_of("Qwen3-0.6B-Base", tmp_path / "mended", generation_config_dot_json=ends)
    assert not found(look(mended, "Qwen3-8B", path), "vocabulary")


def test_a_base_model_takes_the_template_that_is_put_into_its_folder(prompts: Path, tmp_path: Path):
    teacher, path = "Meta-Llama-3-8B-Instruct", prompts / "chats.jsonl"
    refused = look("Meta-Llama-3-8B", teacher, path)
    assert len(found(refused, "length", "red") + found(refused, "template", "red")) == 1  # said once
    template = load_tokenizer(str(FOLDER / teacher)).chat_template
    mended = copy_of("Meta-Llama-3-8B", tmp_path / "mended", chat_template_dot_jinja=template)
    assert found(look(mended, teacher, path), "template", "green") == ["all models read the same text"]
    given = look("Meta-Llama-3-8B", teacher, path, student__chat_template_kwargs={"chat_template": template})
    assert found(given, "template", "green") == ["all models read the same text"]


def test_a_text_that_begins_as_advised_is_no_warning(prompts: Path):
    pair = ("Meta-Llama-3-8B", "Meta-Llama-3-8B-Instruct")
    assert any(
        "without '<|begin_of_text|>'" in text for text in found(look(*pair, prompts / "texts.jsonl"), "template")
    )
    mended = found(look(*pair, prompts / "with_bos.jsonl"), "template")
    assert not any("begin_of_text" in text for text in mended)


def test_a_date_that_is_set_as_advised_stays(prompts: Path):
    path, name = prompts / "chats.jsonl", "Llama-3.2-1B-Instruct"
    (said,) = found(look(name, name, path), "template")
    assert "the student and the teacher writes today's date" in said
    assert "chat_template_kwargs.date_string=" in said
    kwargs = {"date_string": "26 Jul 2024"}
    fixed = look(name, name, path, student__chat_template_kwargs=kwargs, teacher__chat_template_kwargs=kwargs)
    assert not found(fixed, "template")
    assert "26 Jul 2024" in fixed.rendered[0].text


def test_a_student_with_the_teacher_s_tokenizer_is_taken(prompts: Path, tmp_path: Path):
    teacher, path = "DeepSeek-R1-Distill-Qwen-7B", prompts / "chats.jsonl"
    (said,) = found(look("Qwen2.5-Math-1.5B", teacher, path), "vocabulary", "red")
    assert "copy tokenizer.json and tokenizer_config.json of the teacher" in said
    files = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    contents = {f.replace(".", "_dot_"): (FOLDER / teacher / f).read_text(encoding="utf-8") for f in files}
    mended = look(copy_of("Qwen2.5-Math-1.5B", tmp_path / "mended", **contents), teacher, path)
    assert found(mended, "vocabulary", "green") == ["student and teacher share 151,666 token ids"]
    assert not found(mended, "template")


def test_one_system_message_for_both_as_advised(prompts: Path):
    pair, path = ("Llama-3.2-1B-Instruct", "Meta-Llama-3-8B-Instruct"), prompts / "chats.jsonl"
    assert any("prompts.system gives both the same message" in text for text in found(look(*pair, path), "template"))
    given = look(*pair, path, prompts__system="Answer with a number.")
    assert not any("system message" in text for text in found(given, "template"))
    assert all("Answer with a number." in one.text for one in given.rendered)

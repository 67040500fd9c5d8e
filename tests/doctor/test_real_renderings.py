"""The prompts of real templates, held against literals of the published formats: typed here, and not read from a tokenizer's folder.

Each is rendered by transformers alone, and then as `opd check` shows it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from doctor.test_real_tokenizers import EXPECTED, FOLDER, _folders, look  # noqa: F401  # the fixture
from opd import tokenizer as opd_tokenizer

QUESTION = "What is 1 + 2?"
TALK = (
    {"role": "system", "content": "Answer with a number."},
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "And 2 + 2?"},
)
ALONE = ({"role": "user", "content": QUESTION},)
OFF = {"enable_thinking": False}
DATED = {"date_string": "26 Jul 2024"}
CUTOFF = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
HARMONY = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "Current date: TODAY\n\nReasoning: medium\n\n# Valid channels: analysis, commentary, final. Channel must be included for every "
    "message.<|end|>"
)


def chatml(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"


def llama(*turns: tuple[str, str]) -> str:
    heads = [f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>" for role, text in turns]
    return "<|begin_of_text|>" + "".join(heads) + "<|start_header_id|>assistant<|end_header_id|>\n\n"


SYSTEM, ASKED, SAID, AGAIN = (
    ("system", "Answer with a number."),
    ("user", QUESTION),
    ("assistant", "3"),
    ("user", "And 2 + 2?"),
)
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
# U+FF5C is the fullwidth bar, U+2581 the lower block.
BEGIN, END, USER, ASSISTANT = (
    f"<\uff5c{name}\uff5c>"
    for name in ("begin\u2581of\u2581sentence", "end\u2581of\u2581sentence", "User", "Assistant")
)
DEEPSEEK = f"{BEGIN}{USER}{QUESTION}{ASSISTANT}"
DEEPSEEK_TALK = f"{BEGIN}Answer with a number.{USER}{QUESTION}{ASSISTANT}3{END}{USER}And 2 + 2?{ASSISTANT}"
GEMMA_TALK = (
    f"<bos><start_of_turn>user\nAnswer with a number.\n\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n3<end_of_turn>\n"
    "<start_of_turn>user\nAnd 2 + 2?<end_of_turn>\n<start_of_turn>model\n"
)
HARMONY_TALK = (
    f"{HARMONY}<|start|>developer<|message|># Instructions\n\nAnswer with a number.\n\n<|end|><|start|>user<|message|>{QUESTION}<|end|>"
    "<|start|>assistant<|channel|>final<|message|>3<|end|><|start|>user<|message|>And 2 + 2?<|end|><|start|>assistant"
)
RENDERED: tuple[tuple[str, Mapping[str, Any], str, str], ...] = (
    ("Qwen3-8B", {}, chatml(ASKED), chatml(SYSTEM, ASKED, SAID, AGAIN)),
    (
        "Qwen3-8B",
        OFF,
        chatml(ASKED) + "<think>\n\n</think>\n\n",
        chatml(SYSTEM, ASKED, SAID, AGAIN) + "<think>\n\n</think>\n\n",
    ),
    ("Qwen3-0.6B", {"enable_thinking": True}, chatml(ASKED), chatml(SYSTEM, ASKED, SAID, AGAIN)),
    ("Qwen2.5-Math-1.5B", {}, chatml(("system", QWEN_SYSTEM), ASKED), chatml(SYSTEM, ASKED, SAID, AGAIN)),
    ("Meta-Llama-3-8B-Instruct", {}, llama(ASKED), llama(SYSTEM, ASKED, SAID, AGAIN)),
    (
        "Llama-3.2-1B-Instruct",
        DATED,
        llama(("system", CUTOFF), ASKED),
        llama(("system", CUTOFF + "Answer with a number."), ASKED, SAID, AGAIN),
    ),
    (
        "gemma-3-4b-it",
        {},
        f"<bos><start_of_turn>user\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n",
        GEMMA_TALK,
    ),
    ("DeepSeek-V3", {}, DEEPSEEK, DEEPSEEK_TALK),
    ("DeepSeek-R1", {}, f"{DEEPSEEK}<think>\n", f"{DEEPSEEK_TALK}<think>\n"),
    ("DeepSeek-R1-Distill-Qwen-7B", {}, f"{DEEPSEEK}<think>\n", f"{DEEPSEEK_TALK}<think>\n"),
    ("gpt-oss-120b", {}, f"{HARMONY}<|start|>user<|message|>{QUESTION}<|end|><|start|>assistant", HARMONY_TALK),
)
"""Model, arguments of its template, and both prompts as its makers publish the format."""

pytestmark = pytest.mark.timeout(120)


def without_date(text: str) -> str:
    return text.replace(datetime.now().strftime("%Y-%m-%d"), "TODAY").replace(
        datetime.now().strftime("%d %b %Y"), "TODAY"
    )


def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    return opd_tokenizer.load_tokenizer(str(FOLDER / name))


@pytest.mark.parametrize(
    ("name", "arguments", "alone", "talk"),
    RENDERED,
    ids=lambda one: one if isinstance(one, str) and "<" not in one else "",
)
def test_a_real_template_writes_the_published_format_and_opd_check_shows_it(
    name: str, arguments: Mapping[str, Any], alone: str, talk: str, tmp_path: Path
):
    tokenizer = tokenizer_of(name)
    for messages, expected in ((ALONE, alone), (TALK, talk)):
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **arguments)
        assert without_date(str(text)) == expected
    row = tmp_path / "prompts.jsonl"
    row.write_text("".join(json.dumps({"prompt": list(one), "answer": "3"}) + "\n" for one in (ALONE, TALK)))
    more = {"student__chat_template_kwargs": arguments, "teacher__chat_template_kwargs": arguments}
    shown = [without_date(one.text) for one in look(name, name, row, **more).rendered]
    assert shown[0] == alone and set(shown) <= {alone, talk}


STUDENTS_AND_TEACHERS = {
    "qwen3_both_think": (chatml(ASKED), chatml(ASKED)),
    "qwen3_none_thinks": (chatml(ASKED) + "<think>\n\n</think>\n\n",) * 2,
    "qwen3_teacher_thinks": (chatml(ASKED) + "<think>\n\n</think>\n\n", chatml(ASKED)),
    "llama32_from_llama3": (llama(("system", CUTOFF.replace("26 Jul 2024", "TODAY")), ASKED), llama(ASKED)),
    "gemma3": (f"<bos><start_of_turn>user\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n",) * 2,
    "gpt_oss": (f"{HARMONY}<|start|>user<|message|>{QUESTION}<|end|><|start|>assistant",) * 2,
    "deepseek_v3_from_r1": (DEEPSEEK, f"{DEEPSEEK}<think>\n"),
    "r1_distill_qwen": (f"{DEEPSEEK}<think>\n",) * 2,
    "qwen25_from_r1_distill": (chatml(("system", QWEN_SYSTEM), ASKED), f"{DEEPSEEK}<think>\n"),
}
"""By the file of real_pairs."""


@pytest.mark.parametrize("pair", STUDENTS_AND_TEACHERS)
def test_the_expected_lines_of_a_pair_hold_the_published_formats(pair: str):
    text = (EXPECTED / f"{pair}.txt").read_text(encoding="utf-8")
    found = re.findall(r"^(student|teacher) reads '(.*)'$", text, flags=re.M)
    shown = {role: line.replace("\u27e6", "").replace("\u27e7", "").replace("\\n", "\n") for role, line in found}
    student, teacher = STUDENTS_AND_TEACHERS[pair]
    assert shown == ({"student": student} if student == teacher else {"student": student, "teacher": teacher})

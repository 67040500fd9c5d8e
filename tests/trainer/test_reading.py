"""What the two models read is said where it is probably not meant: other endings, arguments without a template, a teacher that agrees."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from opd.config.recipe import build, merge
from opd.testing import CHAT_TEMPLATE, byte_tokenizer, save_model, tiny_causal_lm
from opd.trainer.from_config import RunComponents
from worlds import settings

SMALL = {"layers": 1, "hidden": 16, "heads": 2, "kv_heads": 1, "max_positions": 128, "initializer_range": 0.3}
SWITCHED = (
    CHAT_TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
ALWAYS = CHAT_TEMPLATE + "{% if add_generation_prompt %}<think>\n{% endif %}"
MESSAGES = {"prompt": [{"role": "user", "content": "2+2?"}], "answer": "4"}
TEXT = {"prompt": "2+2?", "answer": "4"}


def model(folder: Path, template: str | None, seed: int = 0, **more: Any) -> str:
    return save_model(
        tiny_causal_lm(byte_tokenizer(), seed=seed, **{**SMALL, **more}), byte_tokenizer(chat_template=template), folder
    )


def warnings(tmp_path: Path, student: str, teacher: str | None, *rows: dict[str, Any], **more: object) -> list[str]:
    rows = rows or (MESSAGES,)
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = settings(tmp_path, tmp_path / "run", eval__every=0, **{"train__prompts_per_step": len(rows), **more})
    values |= {"student.model": student, "prompts.path": str(tmp_path / "own.jsonl"), "prompts.eval_path": None}
    values.pop("teacher.model")
    values |= {"teacher.model": teacher} if teacher is not None else {}
    return list(RunComponents(build(merge({}, values))).warnings)


# --- endings ----------------------------------------------------------------------------------------------------------

ENDS = "end differently: the student's with '\\n<|assistant|>{}', the teacher's with '\\n<|assistant|>{}'"
OFF = "<think>\\n\\n</think>\\n\\n"


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_thinking_mode_on_one_side_only_is_shown_and_the_advice_mends_it(tmp_path: Path, side: str):
    student, teacher = model(tmp_path / "s", SWITCHED), model(tmp_path / "t", SWITCHED, seed=1)
    other = {"student": "teacher", "teacher": "student"}[side]
    argument = {f"{side}__chat_template_kwargs__enable_thinking": False}
    (found,) = warnings(tmp_path, student, teacher, **argument)
    assert ENDS.format(*((OFF, "") if side == "student" else ("", OFF))) in found
    assert f"Set {other}.chat_template_kwargs.enable_thinking=false too" in found
    for value in (False, True):  # as advised, and on purpose otherwise
        told = {**argument, f"{other}__chat_template_kwargs__enable_thinking": value}
        assert warnings(tmp_path, student, teacher, **told) == []


def test_two_templates_that_end_a_prompt_differently_are_shown_without_any_argument(tmp_path: Path):
    student, teacher = model(tmp_path / "s", CHAT_TEMPLATE), model(tmp_path / "t", ALWAYS, seed=1)
    (found,) = warnings(tmp_path, student, teacher)
    assert ENDS.format("", "<think>\\n") in found and "No argument of the templates decides it" in found
    (found,) = warnings(
        tmp_path, student, None, teachers__big__model=teacher, teachers__old__model=student, mixture__kind="loss"
    )
    assert "student and teachers.big read prompts" in found


FORMATS = {
    "another start": "You are kind.\n" + CHAT_TEMPLATE,
    "ChatML": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n",
    "no head": "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("name", FORMATS)
def test_another_format_of_the_turns_is_every_model_s_own(tmp_path: Path, name: str):
    student, teacher = model(tmp_path / "s", FORMATS[name]), model(tmp_path / "t", CHAT_TEMPLATE, seed=1)
    assert warnings(tmp_path, student, teacher) == []
    thinking = model(tmp_path / "o", FORMATS[name] + "<think>", seed=1)
    (found,) = warnings(tmp_path, teacher, thinking)
    assert "end differently: the student's with '\\n<|assistant|>'" in found and "<think>' (prompt 0)" in found


def test_a_teacher_s_own_wording_of_the_prompt_is_no_other_end(tmp_path: Path):
    student, teacher = model(tmp_path / "s", SWITCHED), model(tmp_path / "t", SWITCHED, seed=1)
    wording = "{{ prompt }} (The answer is {{ answer }}.)"
    assert warnings(tmp_path, student, teacher, prompts__teacher_prompt=wording) == []
    told = {"student__chat_template_kwargs__enable_thinking": False}
    (found,) = warnings(tmp_path, student, teacher, prompts__teacher_prompt=wording, **told)
    assert ENDS.format(OFF, "") in found
    assert warnings(tmp_path, student, None, teacher__source="student", prompts__teacher_prompt=wording, **told) == []


EFFORT = "Reasoning: {{ effort if effort is defined else 'medium' }}\n" + CHAT_TEMPLATE


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_mode_that_a_template_sets_at_the_start_is_shown_too(tmp_path: Path, side: str):
    student, teacher = model(tmp_path / "s", EFFORT), model(tmp_path / "t", EFFORT, seed=1)
    other = {"student": "teacher", "teacher": "student"}[side]
    argument = {f"{side}__chat_template_kwargs__effort": "low"}
    (found,) = warnings(tmp_path, student, teacher, **argument)
    assert f"{side}.chat_template_kwargs.effort is set on this side alone" in found
    assert "'Reasoning: low\\n<|user|>" in found and "'Reasoning: medium\\n<|user|>" in found
    assert f'Set {other}.chat_template_kwargs.effort="low" too' in found
    assert warnings(tmp_path, student, teacher, **argument, **{f"{other}__chat_template_kwargs__effort": "high"}) == []
    assert warnings(tmp_path, student, teacher, **{f"{side}__chat_template_kwargs__effort": "medium"}) == []
    assert (
        warnings(
            tmp_path, student, model(tmp_path / "o", CHAT_TEMPLATE, seed=1), student__chat_template_kwargs__effort="low"
        )
        == []
    )


# --- arguments without a template -------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_template_arguments_that_no_prompt_passes_by_are_named(tmp_path: Path, side: str):
    student, teacher = model(tmp_path / "s", SWITCHED), model(tmp_path / "t", SWITCHED, seed=1)
    told = {f"{side}__chat_template_kwargs__enable_thinking": False}
    (found,) = warnings(tmp_path, student, teacher, TEXT, TEXT, **told)
    assert f"{side}.chat_template_kwargs (enable_thinking) changes nothing for all 2 prompts" in found
    both = {f"{role}__chat_template_kwargs__enable_thinking": False for role in ("student", "teacher")}
    found = warnings(tmp_path, student, teacher, TEXT, MESSAGES, MESSAGES, **both)
    assert [
        f"{role}.chat_template_kwargs" in one and "1 of 3 prompts" in one
        for role, one in zip(("student", "teacher"), found, strict=True)
    ] == [True, True]


def test_plain_text_for_a_model_with_a_chat_template_is_remarked_upon(tmp_path: Path):
    plain, chat = model(tmp_path / "s", None), model(tmp_path / "t", CHAT_TEMPLATE, seed=1)
    (found,) = warnings(tmp_path, chat, plain, TEXT)
    assert f"all 1 prompts are plain text, which passes through no chat template, and student '{chat}' has one" in found
    (found,) = warnings(tmp_path, plain, chat, TEXT)
    assert f"teacher '{chat}' has one" in found
    assert warnings(tmp_path, plain, model(tmp_path / "p", None, seed=1), TEXT) == []


# --- a teacher that is the student ------------------------------------------------------------------------------------

AGREES = "has the student's own weights and reads the same prompts (the first ends with '<|user|>2+2?\\n<|assistant|>' for the student"


def test_a_teacher_that_is_the_student_is_noticed_under_any_path_and_dtype(tmp_path: Path):
    student = model(tmp_path / "s", CHAT_TEMPLATE)
    shutil.copytree(student, tmp_path / "copy")
    for teacher in (student, str(tmp_path / "copy")):
        (found,) = warnings(tmp_path, student, teacher)
        assert (
            found.startswith("teacher " + AGREES)
            and "nothing will be learnt" in found
            and "Give teacher.model" in found
        )
    assert len(warnings(tmp_path, student, student, teacher__dtype="bfloat16")) == 1
    assert len(warnings(tmp_path, student, student, student__lora__rank=2)) == 1


def test_a_teacher_that_agrees_is_noticed_among_teachers_of_their_own_prompts(tmp_path: Path):
    student, other = model(tmp_path / "s", CHAT_TEMPLATE), model(tmp_path / "o", CHAT_TEMPLATE, seed=1)
    several = {"teachers__math__model": other, "teachers__code__model": student}
    rows = [{**MESSAGES, "teacher": name} for name in ("math", "code")]
    (found,) = warnings(tmp_path, student, None, *rows, **several)
    assert found.startswith("teachers.code " + AGREES)
    assert warnings(tmp_path, student, None, mixture__kind="probability", **several) == []


def test_a_teacher_with_the_student_s_weights_and_something_to_say_is_left_in_peace(tmp_path: Path):
    student = model(tmp_path / "s", CHAT_TEMPLATE)
    assert warnings(tmp_path, student, model(tmp_path / "t", CHAT_TEMPLATE, seed=1)) == []
    assert warnings(tmp_path, student, student, rl__weight=1, rl__reward="exact_match") == []
    assert warnings(tmp_path, student, student, objective__teacher_temperature=0.7) == []
    assert warnings(tmp_path, student, student, prompts__teacher_prompt="{{ prompt }} {{ answer }}") == []
    one_weight = AutoModelForCausalLM.from_pretrained(student)
    with torch.no_grad():
        one_weight.model.norm.weight[-1] += 0.01
    changed = save_model(one_weight, byte_tokenizer(chat_template=CHAT_TEMPLATE), tmp_path / "changed")
    assert warnings(tmp_path, student, changed) == []

"""Where one template alone has an argument that decides how prompts end, the advice names the value that makes them alike."""

import json
import re
from pathlib import Path

import pytest

from opd.config.recipe import check
from opd.config.words import merge
from opd.doctor.quick import examine
from opd.testing import byte_tokenizer, save_model, tiny_causal_lm

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
QUIET = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"  # as Qwen3's
LOUD = "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"


def with_mode(mode: str) -> str:
    return PLAIN.replace("<assistant>", f"<assistant>{mode}")


@pytest.fixture
def settings(tmp_path: Path):
    """Settings of a student with a plain template, and a teacher whose template has this mode."""

    def make(mode: str, **more: object):
        for name, template in (("student", PLAIN), ("teacher", with_mode(mode))):
            tokenizer = byte_tokenizer(chat_template=template)
            save_model(tiny_causal_lm(tokenizer, hidden=32, layers=1), tokenizer, tmp_path / name)
        prompts = [{"prompt": [{"role": "user", "content": f"{i} + 1?"}]} for i in range(4)]
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
        plain = {
            "student": {"model": str(tmp_path / "student")},
            "teacher": {"model": str(tmp_path / "teacher")},
            "prompts": {"path": str(tmp_path / "prompts.jsonl")},
            "rollout": {"max_new_tokens": 6},
            "eval": {"every": 0},
        }
        return check(merge(plain, {key.replace("__", "."): value for key, value in more.items()}))

    return make


def endings(settings) -> list[str]:
    return [one.seen for one in examine(settings).checks if "end differently" in one.seen]


def test_an_argument_that_makes_the_difference_is_dropped(settings):
    (said,) = endings(settings(QUIET, teacher__chat_template_kwargs={"enable_thinking": False}))
    assert said.endswith("Drop teacher.chat_template_kwargs.enable_thinking.")
    assert endings(settings(QUIET)) == []


def test_an_argument_that_takes_the_difference_away_is_set(settings):
    (said,) = endings(settings(LOUD))
    (value,) = re.findall(r"Set teacher\.chat_template_kwargs\.enable_thinking=(\w+)\.$", said)
    assert endings(settings(LOUD, teacher__chat_template_kwargs={"enable_thinking": json.loads(value)})) == []


def test_where_no_value_helps_the_template_is_to_be_shared(settings):
    (said,) = endings(
        settings("<think>{{ enable_thinking }}</think>", teacher__chat_template_kwargs={"enable_thinking": True})
    )
    assert "No argument of the templates decides it." in said

"""prompts.user_message: a chat prompt of rows whose columns hold no messages."""

import json

import pytest

from opd.config import PromptsConfig
from opd.data.prompts import load_prompts
from opd.errors import ConfigError, DataError

ROWS = [
    {"question": "What is 2 + 3?", "answer": "2 + 3 = 5\n#### 5", "level": {"grade": 1}},
    {"question": "What is {{ 7 }}?", "answer": "#### 7", "level": {"grade": 2}},
]
TEMPLATE = "{{ question }}\nPut the number in \\boxed{}."


@pytest.fixture
def path(tmp_path) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(file)


def test_the_message_is_the_template_filled_with_the_columns_of_the_row(path):
    first, second = load_prompts(path, user_message=TEMPLATE)
    assert first.messages == ({"role": "user", "content": "What is 2 + 3?\nPut the number in \\boxed{}."},)
    assert first.text is None and first.answer == ROWS[0]["answer"]
    # a column that looks like a template is text
    assert second.messages == ({"role": "user", "content": "What is {{ 7 }}?\nPut the number in \\boxed{}."},)


def test_fields_inside_a_column_can_be_read(path):
    assert [p.messages[0]["content"] for p in load_prompts(path, user_message="{{ level.grade }}")] == ["1", "2"]


def test_columns_stay_metadata_for_the_teachers_own_template(path):
    assert load_prompts(path, user_message=TEMPLATE)[0].metadata["question"] == "What is 2 + 3?"


def test_a_column_that_a_row_lacks_is_named_with_the_columns_there(path):
    with pytest.raises(
        DataError,
        match=r"prompts\.user_message cannot be filled in for line 1 of .*'problem' is undefined.* answer, level, question",
    ):
        load_prompts(path, user_message="{{ problem }}")


def test_an_empty_message_is_refused(path):
    with pytest.raises(DataError, match="empty message"):
        load_prompts(path, user_message="  {{ '' }}\n")


def test_a_broken_template_is_refused_before_any_row_is_read(tmp_path):
    with pytest.raises(ConfigError, match=r"prompts\.user_message is not a Jinja template"):
        load_prompts(str(tmp_path / "nowhere.jsonl"), user_message="{{ question")


def test_python_behind_the_sandbox_is_out_of_reach(path):
    with pytest.raises(DataError, match="user_message"):
        load_prompts(path, user_message="{{ ''.__class__.__mro__[1].__subclasses__() }}")


def test_a_prompt_column_beside_it_is_refused():
    with pytest.raises(ConfigError, match=r"prompts\.prompt_column='question' is not read"):
        PromptsConfig(path="x", user_message=TEMPLATE, prompt_column="question")

"""Templates of other people, in small: what each of them wants a conversation to look like, and what it leaves out."""

import json
from typing import Any

import pytest

from opd.data.chat import left_out_notices
from opd.data.rendering import Renderer
from opd.errors import ConfigError, DataError
from opd.testing import CHAT_TEMPLATE, byte_tokenizer
from opd.types import Prompt

END = "{% if add_generation_prompt %}>{% endif %}"
PRINTS = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}" + END
ADDS = "{% for m in messages %}{{ m.role + ':' + m.content + ';' }}{% endfor %}" + END
TRIMS = "{% for m in messages %}{{ m.role }}:{{ m['content'] | trim }};{% endfor %}" + END
TAKES_PARTS = (
    "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
    "{% endfor %};{% endfor %}" + END
)
CALLS = "{% for m in messages %}{{ m.role }}:{{ m.content or '' }}{% for c in m.tool_calls or [] %}CALL{% endfor %};{% endfor %}"
TAKES_OBJECTS = CALLS.replace("CALL", "[{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}]")
DUMPS_OBJECTS = CALLS.replace("CALL", "{{ c.function.arguments | tojson }}")
ADDS_TEXT = CALLS.replace("CALL", "{{ '[' + c.function.arguments + ']' }}")
PRINTS_TEXT = CALLS.replace("CALL", "{{ c.function.arguments }}")
CALLS_OF_NULL = (
    "{% for m in messages %}{{ m.role }}:{% if m.content is none %}{{ m.tool_calls[0].function.name }}{% else %}"
    "{{ m.content + '' }}{% endif %};{% endfor %}"
)
TOOLS = "{% for t in tools or [] %}{{ t['function']['name'] }}({{ t['function']['description'] }}){% endfor %}" + PRINTS
KNOWN_ROLES = (
    "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}{{ m.content }};{% endif %}{% endfor %}"
)
NO_THOUGHTS = "{% for m in messages %}{{ m.content.split('</think>')[-1] }};{% endfor %}"

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": {}}}


def called(arguments, **message):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call], **message}


def render(template: Any, *messages, **options) -> str:
    renderer = Renderer(byte_tokenizer(chat_template=template), name="student 'tiny'")
    return renderer.decode_all(renderer.prompt_ids(Prompt(index=7, messages=messages, **options)))


def notices(template: Any, *prompts: Prompt, **options) -> list[str]:
    renderer = Renderer(byte_tokenizer(chat_template=template), name="student 'tiny'", **options)
    for prompt in prompts:
        renderer.prompt_ids(prompt)
    return left_out_notices([renderer.chat])


def prompt(*messages, index=7, **options) -> Prompt:
    return Prompt(index=index, messages=messages, **options)


# Content: null, missing, text, parts


@pytest.mark.parametrize("template", [PRINTS, ADDS, TRIMS, TAKES_PARTS])
@pytest.mark.parametrize("content", ["hi", [{"type": "text", "text": "hi"}], [{"text": "hi"}], ["hi"]])
def test_a_text_is_shown_however_row_and_template_write_it(template, content):
    assert render(template, {"role": "user", "content": content}) == "user:hi;>"


@pytest.mark.parametrize("template", [PRINTS, ADDS, TRIMS, TAKES_PARTS])
@pytest.mark.parametrize("said", [{}, {"content": None}, {"content": ""}])
def test_null_and_missing_content_is_nothing_and_never_none(template, said):
    message = called({"city": "Rome"}, **said)
    assert render(template, USER, message, {"role": "tool", "content": "sun"}) == "user:hi;assistant:;tool:sun;>"


def test_the_word_none_that_a_row_holds_stays():
    assert render(TRIMS, {"role": "user", "content": "None"}, called({})) == "user:None;assistant:;>"


def test_several_parts_follow_each_other():
    parts = [{"type": "text", "text": "a "}, {"type": "input_text", "text": "b"}]
    assert render(ADDS, {"role": "user", "content": parts}) == render(TAKES_PARTS, {"role": "user", "content": parts})


# Calls


@pytest.mark.parametrize("arguments", [{"city": "Zürich"}, '{"city":"Zürich"}', '{"city": "Z\\u00fcrich"}'])
@pytest.mark.parametrize(
    ("template", "shown"),
    [
        (TAKES_OBJECTS, "[city=Zürich]"),
        (DUMPS_OBJECTS, '{"city": "Zürich"}'),
        (ADDS_TEXT, '[{"city": "Zürich"}]'),
        (PRINTS_TEXT, '{"city": "Zürich"}'),
    ],
)
def test_arguments_are_shown_however_row_and_template_write_them(template, arguments, shown):
    assert render(template, USER, called(arguments)) == f"user:hi;assistant:{shown};"


def test_arguments_that_are_no_json_object_are_shown_as_they_are():
    assert render(ADDS_TEXT, USER, called("city: Rome")) == "user:hi;assistant:[city: Rome];"
    assert render(ADDS_TEXT, USER, called("[1, NaN]")) == "user:hi;assistant:[[1, NaN]];"


def test_a_null_that_a_text_of_arguments_spells_is_shown():
    assert render(DUMPS_OBJECTS, USER, called('{"unit": null}')) == 'user:hi;assistant:{"unit": null};'


def test_a_call_without_arguments_has_none():
    for arguments in ("", "{}", {}, []):
        assert render(DUMPS_OBJECTS, USER, called(arguments)) == "user:hi;assistant:{};"


@pytest.mark.parametrize("said", [{}, {"content": None}, {"content": ""}])
def test_a_call_is_shown_by_a_template_that_looks_for_null_content(said):
    assert render(CALLS_OF_NULL, USER, called({}, **said)) == "user:hi;assistant:weather;"


# Tools and other arguments of a row


@pytest.mark.parametrize("tool", [TOOL, TOOL["function"]])
def test_tools_reach_the_template_with_and_without_their_wrapping(tool):
    assert render(TOOLS, USER, template_arguments={"tools": [tool]}) == "weather(Tells it.)user:hi;>"


def test_a_rows_argument_comes_before_the_recipes():
    tokenizer = byte_tokenizer(chat_template="{% if think %}T{% endif %}" + PRINTS)
    renderer = Renderer(tokenizer, name="student 'tiny'", chat_template_kwargs={"think": True})
    ids = [renderer.prompt_ids(prompt(USER, template_arguments=own)) for own in ({}, {"think": False})]
    assert [renderer.decode(one) for one in ids] == ["Tuser:hi;>", "user:hi;>"]


def test_named_templates_are_chosen_by_default_by_tools_and_by_the_recipe():
    named: Any = {"default": "D" + PRINTS, "tool_use": "T" + PRINTS, "rag": "R" + PRINTS}
    assert render(named, USER) == "Duser:hi;>"
    assert render(named, USER, template_arguments={"tools": [TOOL]}) == "Tuser:hi;>"
    tokenizer = byte_tokenizer(chat_template=named)
    renderer = Renderer(tokenizer, name="student 'tiny'", chat_template_kwargs={"chat_template": "rag"})
    assert renderer.decode(renderer.prompt_ids(prompt(USER))) == "Ruser:hi;>"
    assert render(named, USER, template_arguments={"chat_template": "rag"}) == "Ruser:hi;>"
    assert notices(named, prompt(USER, template_arguments={"chat_template": "rag"})) == []


def test_the_only_template_is_taken_whatever_its_name():
    assert render({"chatml": PRINTS}, USER) == "user:hi;>"


def test_several_templates_without_a_default_are_refused_with_the_key_that_chooses():
    named: Any = {"rag": PRINTS, "tool_use": "T" + PRINTS}
    with pytest.raises(DataError) as error:
        render(named, USER)
    assert "rag, tool_use" in str(error.value)
    advice = str(error.value).partition("Choose one with --student.chat_template_kwargs '")[2].removesuffix("'.")
    assert advice == "{chat_template: rag}"
    assert render(named, USER, template_arguments={"tools": [TOOL]}) == "Tuser:hi;>"


def test_a_template_that_is_not_there_is_refused_by_name():
    named: Any = {"a": "", "b": ""}
    with pytest.raises(ConfigError, match=r"names no chat template of student 'tiny'; it has a, b"):
        Renderer(
            byte_tokenizer(chat_template=named), name="student 'tiny'", chat_template_kwargs={"chat_template": "c"}
        )


def test_an_argument_that_only_one_of_several_templates_reads_is_taken():
    named: Any = {"default": PRINTS, "tool_use": "{{ date }}" + PRINTS}
    Renderer(byte_tokenizer(chat_template=named), name="s", chat_template_kwargs={"date": "today"})


# Whatever a template raises


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages[5].content + 'a' }}", "has no element 5"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ messages | sum }}", "TypeError: unsupported operand"),
        ("{{ messages[0].content | int | list }}", "TypeError: 'int' object is not iterable"),
        ("{{ strftime_now(3) }}", "TypeError"),
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('\x1b]0;x\x07') }}", "\\x1b]0;x\\x07"),
        ("{{ raise_exception('two\nlines') }}", "prompt 7: two lines."),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_whatever_a_template_raises_is_one_data_error_with_the_row(template, said):
    with pytest.raises(DataError) as error:
        render(template, USER)
    message = str(error.value)
    assert message.startswith("the chat template of student 'tiny' refuses prompt 7: ") and said in message
    assert "Its roles are user" in message and "\x1b" not in message


def test_a_rendering_that_the_tokenizer_cannot_read_is_a_data_error_with_the_row():
    with pytest.raises(DataError, match=r"prompt 7 cannot be tokenised by the tokenizer of student 'tiny'"):
        render(PRINTS, {"role": "user", "content": "half of one \ud800"})


# What is left out is said


def test_nothing_is_said_where_everything_is_shown():
    result = {"role": "tool", "name": "weather", "tool_call_id": "c1", "content": "a\n\nb"}
    rows = [prompt(USER, called({"city": "Rome"}, content="so"), result), prompt(USER)]
    assert notices(CALLS.replace("CALL", "{{ c | tojson }}"), *rows) == []
    assert notices(TOOLS, prompt(USER, template_arguments={"tools": [TOOL]})) == []
    assert (
        notices("{% for m in messages %}{{ m.content | tojson }}{% endfor %}", prompt({**USER, "content": 'a"\n'}))
        == []
    )
    assert notices(TRIMS, prompt({**USER, "content": " a\n"})) == []


@pytest.mark.parametrize("content", ["Answer in French.", "hi"])
def test_a_message_that_the_template_drops_is_said_even_where_its_words_are_there_by_chance(content):
    rows = [prompt(USER, index=3), *(prompt({"role": "developer", "content": content}, USER, index=i) for i in (4, 5))]
    (notice,) = notices(KNOWN_ROLES, *rows)
    assert "prompts of student 'tiny' do not show" in notice and "content of developer messages" in notice
    assert "the first is prompt 4" in notice


def test_tools_that_the_template_drops_are_said_even_where_their_words_are_there_by_chance():
    tool = {"type": "function", "function": {"name": "hi", "description": "u"}}
    (notice,) = notices(PRINTS, prompt(USER, template_arguments={"tools": [tool]}))
    assert "tools (1 row" in notice


def test_a_part_of_a_message_that_the_template_drops_is_said():
    (notice,) = notices(NO_THOUGHTS, prompt(USER, {"role": "assistant", "content": "<think>hm</think>yes"}, USER))
    assert "content of assistant messages (1 row" in notice and "in part" in notice


@pytest.mark.parametrize(
    ("message", "what"),
    [
        ({**USER, "name": "Ada"}, "name of user messages"),
        ({"role": "assistant", "content": "so", "reasoning_content": "hm"}, "reasoning_content of assistant messages"),
        (called({"city": "Rome"}, content="so"), "tool_calls of assistant messages"),
    ],
)
def test_a_key_that_the_template_drops_is_said(message, what):
    (notice,) = notices(PRINTS, prompt(USER, message, USER))
    assert what in notice


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"tools": [TOOL]}, "tools (1 row, the first is prompt 7)"),
        ({"documents": [{"title": "A", "text": "B"}]}, "documents (1 row"),
        ({"enable_thinking": False}, "chat_template_kwargs.enable_thinking"),
        ({"tokenize": True}, "chat_template_kwargs.tokenize"),
    ],
)
def test_an_argument_that_the_template_does_not_read_is_said(arguments, what):
    (notice,) = notices(PRINTS, prompt(USER, template_arguments=arguments))
    assert what in notice


def test_arguments_of_a_plain_text_prompt_are_said():
    (notice,) = notices(None, Prompt(index=2, text="hi", template_arguments={"tools": [TOOL]}))
    assert "tools beside a prompt that is plain text (1 row, the first is prompt 2)" in notice


def test_a_none_that_no_row_holds_is_said():
    (notice,) = notices("{{ tools }}" + PRINTS, prompt(USER))
    assert "the chat template of student 'tiny' writes None" in notice
    assert notices("None: {{ tools or 'None' }}" + PRINTS, prompt(USER)) == []


def test_models_with_the_same_gap_share_a_sentence():
    renderers = [Renderer(byte_tokenizer(chat_template=PRINTS), name=name) for name in ("student 'a'", "teacher 'b'")]
    for renderer in renderers:
        renderer.prompt_ids(prompt(USER, template_arguments={"tools": [TOOL]}))
    (notice,) = left_out_notices(renderer.chat for renderer in renderers)
    assert "prompts of student 'a' and teacher 'b' do not show" in notice


def test_an_ordinary_prompt_is_rendered_as_transformers_does():
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    messages = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "yo"}, USER]
    encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert Renderer(tokenizer, name="s").prompt_ids(prompt(*messages)) == tuple(encoded["input_ids"])


def test_tools_and_arguments_are_rendered_in_the_rows_own_order():
    schema = {"type": "object", "properties": {"unit": {"type": "string"}, "city": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": schema}}
    shown = render(
        "{{ tools | tojson }}" + DUMPS_OBJECTS, USER, called({"b": 1, "a": 2}), template_arguments={"tools": [tool]}
    )
    assert shown == json.dumps([tool]) + 'user:hi;assistant:{"b": 1, "a": 2};'

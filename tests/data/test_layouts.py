"""One conversation in the layouts and the files of other trainers: always the same prompt."""

import gzip
import json
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.data.prompts import load_prompts, unread_columns
from opd.data.rendering import Renderer
from opd.errors import DataError
from opd.testing import byte_tokenizer
from opd.types import Prompt

TEMPLATE = (
    "{% if think is defined %}{{ think }}{% endif %}{{ tools | tojson if tools else '' }}"
    "{% for m in messages %}<{{ m.role }}>{% for key, value in m.items() %}{{ key }}={{ value | tojson }} {% endfor %}{% endfor %}"
)
"""Shows whatever is there, nulls and key orders included."""
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


def call(name="f", arguments=None):
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments or {}}}


def tool(name, description=None, **properties):
    function = {"name": name, "description": description, "parameters": {"type": "object", "properties": properties}}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="prompts.jsonl") -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return write


@pytest.fixture
def arrow(tmp_path):
    def write(*rows) -> str:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), tmp_path / "prompts.parquet")
        return str(tmp_path / "prompts.parquet")

    return write


def ids(path: str, template=TEMPLATE, **options) -> list[tuple[int, ...]]:
    renderer = Renderer(byte_tokenizer(chat_template=template), name="student")
    return [renderer.prompt_ids(prompt) for prompt in load_prompts(path, **options)]


def said(path: str, **options) -> list[str]:
    notes: list[str] = []
    load_prompts(path, say=notes.append, note=notes.append, **options)
    return notes


# One prompt, three kinds of file

values = st.one_of(st.integers(-9, 9), st.booleans(), st.text('aé"\n', max_size=3))
optional = {
    "a": st.text("xy", max_size=3),
    "b": st.integers(0, 9) | st.sampled_from([0.5, 2.0]),
    "c": st.fixed_dictionaries({}, optional={"d": st.booleans()}),
}
arguments = st.fixed_dictionaries({}, optional=optional)
calls = st.builds(call, st.sampled_from(["f", "g"]), arguments).map(lambda c: [c])
messages = st.one_of(
    st.fixed_dictionaries({"role": st.just("user"), "content": st.text("uv ", min_size=1).filter(str.strip)}),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": st.sampled_from([None, "", "so"]), "tool_calls": calls}
    ),
    st.fixed_dictionaries({"role": st.just("assistant"), "tool_calls": calls}),
    st.fixed_dictionaries(
        {"role": st.just("tool"), "content": st.text("rs")},
        optional={"name": st.just("f"), "tool_call_id": st.just("c1")},
    ),
)
schemas = st.fixed_dictionaries(
    {"type": st.sampled_from(["string", "integer"])}, optional={"description": st.just("d")}
)
tools = st.builds(tool, st.sampled_from(["f", "g"]), st.sampled_from([None, "does"]), x=schemas, y=schemas)
rows = st.fixed_dictionaries(
    {"prompt": st.lists(messages, min_size=1, max_size=4).map(lambda found: [*found, USER])},
    optional={
        "tools": st.lists(tools, max_size=2),
        "chat_template_kwargs": st.fixed_dictionaries({}, optional={"think": st.booleans()}),
        "extra": st.integers(),
    },
)


USUAL_ORDER = ("prompt", "role", "content", "id", "type", "function", "name", "description", "parameters", "arguments")


def in_one_key_order(found):
    """Arrow has one order of keys for a whole column, that in which it meets them; texts of JSON keep their own."""
    if isinstance(found, list):
        return [in_one_key_order(item) for item in found]
    if not isinstance(found, dict):
        return found
    known = [key for key in USUAL_ORDER if key in found]
    return {key: in_one_key_order(found[key]) for key in [*known, *sorted(found.keys() - known)]}


@settings(max_examples=15, deadline=None)
@given(st.lists(rows, min_size=1, max_size=3))
def test_a_prompt_has_the_same_ids_from_jsonl_parquet_and_a_datasets_folder(tmp_path_factory, found):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    every_key = call(arguments={"a": "", "b": 0, "c": {"d": True}})
    first = {"role": "assistant", "content": "", "tool_calls": [every_key], "name": "f", "tool_call_id": "c1"}
    schema = {"type": "string", "description": "d"}
    full = {"prompt": [first, USER], "chat_template_kwargs": {"think": True}, "tools": [tool("h", "does", x=schema)]}
    found = in_one_key_order([full, *found])
    folder = tmp_path_factory.mktemp("forms")
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), folder / "p.parquet")
    datasets.Dataset.from_list(found).save_to_disk(folder / "saved")
    expected = ids(str(folder / "p.jsonl"))
    assert ids(str(folder / "p.parquet")) == expected
    assert ids(str(folder / "saved")) == expected


def test_null_keys_of_tools_calls_and_arguments_are_dropped_wherever_they_are(arrow, write):
    weather = tool("weather", city={"type": "string", "enum": ["Rome"]})
    add = tool("add", "Adds.", a={"type": "integer"})
    found = [
        {
            "prompt": [USER, {"role": "assistant", "tool_calls": [call("weather", {"city": "Rome"})]}, USER],
            "tools": [weather],
        },
        {"prompt": [USER, {"role": "assistant", "tool_calls": [call("add", {"a": 1})]}, USER], "tools": [add, weather]},
    ]
    assert ids(arrow(*found)) == ids(write(*found))
    text = Renderer(byte_tokenizer(chat_template=TEMPLATE), name="s")
    shown = text.decode(text.prompt_ids(load_prompts(arrow(*found))[1]))
    assert (
        "null" not in shown.replace("content=null", "")
        and '"arguments": {"a": 1}' in shown
        and '"name": "add", "description": "Adds.", ' in shown
    )


def test_maps_dates_decimals_and_bytes_of_arrow_become_what_json_would_hold(tmp_path):
    import datetime

    arguments = pyarrow.map_(pyarrow.string(), pyarrow.string())
    function = pyarrow.struct({"name": pyarrow.string(), "arguments": arguments})
    message = pyarrow.struct(
        {
            "role": pyarrow.string(),
            "content": pyarrow.binary(),
            "tool_calls": pyarrow.list_(pyarrow.struct({"function": function})),
            "on": pyarrow.date32(),
            "cost": pyarrow.decimal128(5, 2),
        }
    )
    calls = [{"function": {"name": "f", "arguments": [("city", "Rome"), ("unit", None)]}}]
    row = [
        {"role": "user", "content": b"h\xc3\xa9", "on": datetime.date(2024, 1, 2), "cost": Decimal("1.50")},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": b"ok"},
    ]
    table = pyarrow.table({"prompt": pyarrow.array([row], pyarrow.list_(message))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert load_prompts(str(tmp_path / "a.parquet"))[0].messages == (
        {"role": "user", "content": "hé", "on": "2024-01-02", "cost": 1.5},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": {"city": "Rome"}}}],
        },
        {"role": "tool", "content": "ok"},
    )


def test_messages_as_an_object_of_lists_are_messages(write):
    row = {"prompt": {"role": ["system", "user"], "content": ["Be brief.", "hi"]}}
    assert load_prompts(write(row))[0].messages == ({"role": "system", "content": "Be brief."}, USER)


# Columns for the template


@pytest.mark.parametrize("form", [list, json.dumps, lambda tools: [json.dumps(t) for t in tools]])
def test_tools_are_read_as_objects_and_as_json_text(write, form):
    found = [tool("f", "does", x={"type": "string"})]
    prompt = load_prompts(write({"prompt": [USER], "tools": form(found)}))[0]
    assert prompt.template_arguments == {"tools": found}


@pytest.mark.parametrize("nothing", [None, [], "", "[]", "null"])
def test_no_tools_are_no_argument(write, nothing):
    row = {"prompt": [USER], "tools": nothing, "chat_template_kwargs": nothing or {}}
    assert load_prompts(write(row))[0].template_arguments == {}
    assert said(write(row)) == []


def test_documents_and_template_arguments_of_a_row_are_read(write):
    documents = [{"title": "A", "text": "B"}]
    row = {"prompt": [USER], "documents": documents, "chat_template_kwargs": '{"think": false, "date": null}'}
    assert load_prompts(write(row))[0].template_arguments == {"documents": documents, "think": False}


@pytest.mark.parametrize("odd", ["hammer, saw", ["hammer"], 3, '[{"name": "f"}', [None]])
def test_a_tools_column_that_is_something_else_stays_a_column_and_is_said(write, odd):
    path = write({"prompt": [USER]}, {"prompt": [USER], "tools": odd})
    prompt = load_prompts(path)[1]
    assert prompt.template_arguments == {} and prompt.metadata["tools"] == odd
    (note,) = said(path)
    assert f"line 2 of {path}: 'tools' is" in note and "not a list of objects, so no chat template gets it" in note


def test_columns_that_look_like_a_part_of_the_prompt_are_said(write):
    prompts = load_prompts(
        write({"prompt": "hi", "system": "Be brief.", "context": "Rome.", "level": 3, "images": None})
    )
    (note,) = unread_columns(prompts, "p.jsonl", "")
    assert "p.jsonl has context, system, which no prompt holds" in note
    (note,) = unread_columns(prompts, "p.jsonl", "{{ prompt }} {{ context }}")
    assert "p.jsonl has system, which" in note
    assert unread_columns([Prompt(index=0, text="a", metadata={"level": 3})], "p.jsonl", "") == []


# ShareGPT, and answers that are there already


def test_sharegpt_conversations_are_messages(write):
    said_call = json.dumps({"name": "f", "arguments": {"x": 1}})
    conversation = [
        {"from": "system", "value": "Be brief."},
        {"from": "Human", "value": "hi"},
        {"from": "function_call", "value": said_call},
        {"from": "observation", "value": "ok"},
    ]
    (prompt,) = load_prompts(write({"conversations": conversation}), prompt_column="conversations")
    assert prompt.messages == (
        {"role": "system", "content": "Be brief."},
        USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "ok"},
    )


def test_a_speaker_that_nobody_knows_is_refused_with_those_that_are_known(write):
    with pytest.raises(DataError, match=r"message 1 of 'prompt' is from 'narrator'; write one of human, user, gpt"):
        load_prompts(write({"prompt": [{"from": "narrator", "value": "hi"}]}))


@pytest.mark.parametrize(
    "conversation", [[USER, ANSWER], [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]]
)
def test_the_assistants_last_message_becomes_the_response_and_that_is_said(write, conversation):
    path = write({"messages": conversation}, {"messages": conversation[:1]})
    first, second = load_prompts(path, prompt_column="messages")
    assert (first.messages, first.response) == ((USER,), "yo")
    assert (second.messages, second.response) == ((USER,), None)
    (note,) = said(path, prompt_column="messages")
    assert "1 of 2 rows" in note and "the prompt is what comes before it" in note


def test_a_response_of_the_rows_own_comes_before_the_last_message_and_that_is_said(write):
    path = write({"prompt": [USER, ANSWER], "response": "other"})
    assert load_prompts(path)[0].response == "other"
    assert "1 of the assistant's answers after a prompt are left out" in said(path)[1]


@pytest.mark.parametrize("turn", [ANSWER, {"from": "gpt", "value": "yo"}])
def test_a_response_may_be_a_message_of_the_assistant(write, turn):
    (prompt,) = load_prompts(write({"prompt": [USER], "completion": [turn]}), response_column="completion")
    assert prompt.response == "yo"
    with pytest.raises(DataError, match=r"'completion' is a list; it has to be text or null"):
        load_prompts(write({"prompt": [USER], "completion": [USER]}), response_column="completion")


def test_a_last_message_that_calls_a_tool_is_no_response(write):
    path = write({"prompt": [USER, {**ANSWER, "tool_calls": [call()]}]})
    (prompt,) = load_prompts(path)
    assert (prompt.messages, prompt.response) == ((USER,), None)
    assert "left out" in said(path)[1]


@pytest.mark.parametrize(
    "message", [{"role": "assistant"}, {"role": "tool", "content": None}, {"role": "system", "content": []}]
)
def test_messages_of_anybody_but_the_user_may_be_empty(write, message):
    (prompt,) = load_prompts(write({"prompt": [message, USER]}))
    assert prompt.messages and not prompt.messages[0]["content"]


@pytest.mark.parametrize("result", [{"temp": 20, "sky": "blå"}, 20, True, [1, 2], [{"temp": 20}]])
def test_a_result_that_is_no_text_is_its_json(write, result):
    (prompt,) = load_prompts(write({"prompt": [USER, {"role": "tool", "content": result}]}))
    assert prompt.messages and prompt.messages[1]["content"] == json.dumps(result, ensure_ascii=False)


def test_a_part_that_is_no_text_is_refused_by_its_type(write):
    content = [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(
        DataError, match=r"message 1 of 'prompt' has a list as its content, with a part that is type 'image_url'"
    ):
        load_prompts(write({"prompt": [{"role": "user", "content": content}]}))


# Columns inside columns


VERL = {
    "prompt": [USER],
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "extra_info": {"answers": ["4", "four"]},
}


@pytest.mark.parametrize("column", ["reward_model.ground_truth", "extra_info.answers.0"])
def test_a_dotted_column_reaches_inside(write, arrow, column):
    for path in (write(VERL), arrow(VERL)):
        (prompt,) = load_prompts(path, answer_column=column)
        assert prompt.answer == "4" and prompt.metadata["reward_model"] == VERL["reward_model"]


def test_prompt_response_and_teacher_can_be_inside_too(write):
    row = {"a": {"q": "hi", "r": "yo", "t": "math"}, "a.b": "whole name"}
    (prompt,) = load_prompts(
        write(row), prompt_column="a.q", response_column="a.r", teacher_column="a.t", answer_column="a.b"
    )
    assert (prompt.text, prompt.response, prompt.teacher, prompt.answer) == ("hi", "yo", "math", "whole name")


def test_an_answer_that_is_an_object_is_refused_with_what_it_holds(write):
    with pytest.raises(DataError, match=r"Name what it holds: reward_model.style, reward_model.ground_truth\."):
        load_prompts(write(VERL), answer_column="reward_model")


def test_a_misspelt_field_is_answered_with_the_nearest(write):
    with pytest.raises(DataError, match=r"Did you mean 'reward_model.ground_truth'\?"):
        load_prompts(write(VERL), answer_column="reward_model.ground_truht")


# Files


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    "text",
    [
        '[{"prompt": "a"}, {"prompt": "b"}]',
        '[\n  {"prompt": "a"},\n  {"prompt": "b"}\n]\n',
        '{"prompt": "a"}\n{"prompt": "b"}\n',
        '{\n  "prompt": "a"\n}\n\n{\n  "prompt": "b"\n}\n',
    ],
)
def test_arrays_and_objects_over_several_lines_are_rows(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    for path in (tmp_path / name, tmp_path / f"{name}.gz"):
        assert [prompt.text for prompt in load_prompts(str(path))] == ["a", "b"]


def test_an_item_of_an_array_that_is_no_object_is_named(tmp_path):
    (tmp_path / "a.json").write_text('[{"prompt": "a"}, 3]')
    with pytest.raises(DataError, match=r"item 2 of .*a.json is the number 3, not an object"):
        load_prompts(str(tmp_path / "a.json"))


def test_a_broken_archive_is_refused(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}' * 99)[:-9])
    with pytest.raises(DataError, match="cannot be unpacked"):
        load_prompts(str(tmp_path / "a.jsonl.gz"))


def test_escape_sequences_of_a_file_reach_no_terminal(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\x1b]0;title\x07 not json\n")
    with pytest.raises(DataError) as error:
        load_prompts(str(tmp_path / "a.jsonl"))
    assert "\\x1b]0;title\\x07 not json" in str(error.value) and "\x1b" not in str(error.value)


class Narrow(pyarrow.parquet.ParquetFile):
    """Arrow on a nested column of which so many rows hold more than 2 GB, from a row on."""

    rows, start = 7, 0

    def iter_batches(self, batch_size=65536, **options):
        for batch in super().iter_batches(batch_size=batch_size, **options):
            if batch.num_rows >= self.rows and batch["prompt"][0].as_py() >= f"q{self.start:02d}":
                raise pyarrow.ArrowNotImplementedError(
                    "Nested data conversions not implemented for chunked array outputs"
                )
            yield batch


@pytest.mark.parametrize(("batch", "start"), [(1024, 0), (8, 8), (8, 24)])
def test_rows_that_arrow_cannot_hold_in_one_batch_are_read_in_smaller_ones(tmp_path, monkeypatch, batch, start):
    found = [{"prompt": f"q{i:02d}", "reward_model": {"ground_truth": str(i)}} for i in range(50)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), tmp_path / "a.parquet", row_group_size=20)
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", Narrow)
    monkeypatch.setattr(Narrow, "start", start)
    monkeypatch.setattr("opd.data.rows.BATCH_ROWS", batch)
    prompts = load_prompts(str(tmp_path / "a.parquet"), answer_column="reward_model.ground_truth")
    assert [prompt.answer for prompt in prompts] == [str(i) for i in range(50)]


def test_a_row_that_arrow_cannot_hold_at_all_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", Narrow)
    monkeypatch.setattr(Narrow, "rows", 1)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "q00"}] * 20), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        load_prompts(str(tmp_path / "a.parquet"))

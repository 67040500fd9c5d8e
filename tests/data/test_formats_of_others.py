"""Ten rows of each format in files as other trainers' tools write them, read with no column named."""

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from opd.data.prompts import load_prompts, unread_columns
from opd.data.rendering import Renderer
from opd.errors import DataError
from opd.testing import byte_tokenizer

TEN = range(10)
KINDS = ("jsonl", "json", "parquet", "folder")
TEMPLATE = (
    "{% if enable_thinking is defined %}think={{ enable_thinking }} {% endif %}{{ tools | tojson if tools else '' }}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def write(tmp_path):
    def write(rows, kind: str) -> str:
        path = tmp_path / f"rows.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif kind == "json":
            path.write_text(json.dumps(rows, indent=2))
        elif kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            datasets.Dataset.from_list(rows).save_to_disk(path)
        return str(path)

    return write


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def asked(n: int) -> str:
    return f"What is {n} + {n}?"


@pytest.mark.parametrize("kind", KINDS)
def test_verl(write, kind):
    """The columns of verl's example scripts, such as examples/data_preprocess/gsm8k.py."""
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [user(f'{asked(n)} Let\'s think step by step and output the final answer after "####".')],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(2 * n)},
            "extra_info": {
                "split": "train",
                "index": n,
                "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}",
                "question": asked(n),
            },
        }
        for n in TEN
    ]
    path = write(rows, kind)
    prompts = load_prompts(path)
    assert [prompt.messages for prompt in prompts] == [tuple(row["prompt"]) for row in rows]
    assert [prompt.answer for prompt in prompts] == [str(2 * n) for n in TEN]
    assert prompts[3].metadata["data_source"] == "openai/gsm8k" and prompts[3].metadata["extra_info"]["index"] == 3
    assert unread_columns(prompts, path, "") == []
    named = load_prompts(path, prompt_column="extra_info.question", answer_column="extra_info.index")
    assert [(prompt.text, prompt.answer) for prompt in named] == [(asked(n), str(n)) for n in TEN]


def test_a_ground_truth_of_verl_that_is_no_text_is_left_to_rewards_that_read_it(write):
    truth = [{"target": n, "numbers": [n, 1]} for n in TEN]
    rows = [{"prompt": [user("Reach it.")], "reward_model": {"style": "rule", "ground_truth": one}} for one in truth]
    said: list[str] = []
    path = write(rows, "parquet")
    prompts = load_prompts(path, say=said.append)
    assert {prompt.answer for prompt in prompts} == {None}
    assert prompts[4].metadata["reward_model"]["ground_truth"]["target"] == 4
    (sentence,) = said
    assert "row 0" in sentence and "'reward_model.ground_truth' is an object, so it is no answer" in sentence
    assert "Name what it holds: reward_model.ground_truth.target" in sentence and "(10 such rows)" in sentence
    named = load_prompts(path, answer_column="reward_model.ground_truth.target")
    assert [prompt.answer for prompt in named] == [str(n) for n in TEN]


@pytest.mark.parametrize("kind", KINDS)
def test_trl_language_modelling(write, kind):
    """`messages`, with the assistant's answer at the end; ms-swift and OpenAI write the same."""
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                user("hi"),
                assistant("Hello."),
                user(asked(n)),
                assistant(f"{2 * n}."),
            ]
        }
        for n in TEN
    ]
    prompts = load_prompts(write(rows, kind))
    assert [prompt.messages for prompt in prompts] == [tuple(row["messages"][:-1]) for row in rows]
    assert [prompt.response for prompt in prompts] == [f"{2 * n}." for n in TEN]
    assert {*prompts[0].metadata} == set()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("conversational", [True, False])
def test_trl_prompt_completion(write, kind, conversational):
    rows = [{"prompt": [user(asked(n))], "completion": [assistant(f"{2 * n}.")]} for n in TEN]
    if not conversational:
        rows = [{"prompt": asked(n), "completion": f" {2 * n}."} for n in TEN]
    prompts = load_prompts(write(rows, kind))
    assert [prompt.messages or prompt.text for prompt in prompts] == [
        tuple(row["prompt"]) if conversational else row["prompt"] for row in rows
    ]
    assert [prompt.response for prompt in prompts] == [f"{'' if conversational else ' '}{2 * n}." for n in TEN]


@pytest.mark.parametrize("kind", KINDS)
def test_trl_prompt_only_with_its_template_arguments_and_tools(write, kind):
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": parameters}}
    rows = [
        {"prompt": [user(asked(n))], "tools": [tool], "chat_template_kwargs": {"enable_thinking": n % 2 == 0}}
        for n in TEN
    ]
    renderer = Renderer(byte_tokenizer(chat_template=TEMPLATE), name="student")
    for n, prompt in enumerate(load_prompts(write(rows, kind))):
        text = renderer.decode_all(renderer.prompt_ids(prompt))
        assert text == f"think={n % 2 == 0} {json.dumps([tool])}<user>{asked(n)}<assistant>"


@pytest.mark.parametrize("kind", KINDS)
def test_sharegpt(write, kind):
    """`conversations`, and beside them LLaMA-Factory's columns `system` and `tools`, which are texts."""
    tools = [{"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}]
    rows = [
        {
            "conversations": [
                {"from": "human", "value": asked(n)},
                {"from": "function_call", "value": json.dumps({"name": "add", "arguments": {"a": n}})},
                {"from": "observation", "value": str(2 * n)},
                {"from": "gpt", "value": f"It is {2 * n}."},
            ],
            "system": "Use tools.",
            "tools": json.dumps(tools),
        }
        for n in TEN
    ]
    path = write(rows, kind)
    prompts = load_prompts(path)
    for n, prompt in enumerate(prompts):
        first, question, call, result = prompt.messages
        assert first == {"role": "system", "content": "Use tools."} and question == user(asked(n))
        assert call["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": n}}
        assert result == {"role": "tool", "content": str(2 * n)}
        assert prompt.response == f"It is {2 * n}." and prompt.template_arguments == {"tools": tools}
    assert unread_columns(prompts, path, "") == []


def test_a_system_message_among_the_messages_comes_before_the_column(write):
    conversation = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "hi"}]
    path = write([{"conversations": conversation, "system": "Be long."}], "jsonl")
    prompts = load_prompts(path)
    assert [message["content"] for message in prompts[0].messages] == ["Be brief.", "hi"]
    assert "has system, which no prompt holds" in unread_columns(prompts, path, "")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_content_parts(write, kind):
    rows = [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Add: "}, {"type": "text", "text": asked(n)}]},
                      {"role": "assistant", "content": [{"type": "text", "text": str(2 * n)}]}]}
        for n in TEN
    ]  # fmt: skip
    renderer = Renderer(byte_tokenizer(chat_template=TEMPLATE), name="student")
    for n, prompt in enumerate(load_prompts(write(rows, kind))):
        assert renderer.decode_all(renderer.prompt_ids(prompt)) == f"<user>Add: {asked(n)}<assistant>"
        assert prompt.response == str(2 * n)


def test_opds_own_columns_come_before_those_of_others(write):
    row = {
        "prompt": "own",
        "messages": [user("other")],
        "answer": "1",
        "reward_model": {"ground_truth": "2"},
        "response": "own",
        "completion": "other",
    }
    path = write([row], "jsonl")
    (prompt,) = prompts = load_prompts(path)
    assert (prompt.text, prompt.answer, prompt.response) == ("own", "1", "own")
    assert "has messages, which no prompt holds" in unread_columns(prompts, path, "")[0]


def test_a_column_that_is_named_is_not_looked_for_elsewhere(write):
    path = write([{"messages": [user("hi")]}], "jsonl")
    with pytest.raises(DataError, match=r"no column 'question'.*Columns there: 'messages'"):
        load_prompts(path, prompt_column="question")


def test_where_something_is_read_is_noted_and_is_no_warning(write):
    path = write([{"messages": [user("hi")], "reward_model": {"ground_truth": "1"}}, {"prompt": "a"}], "jsonl")
    said, noted = [], []
    load_prompts(path, say=said.append, note=noted.append)
    name = Path(path)
    assert said == []
    assert noted == [
        f"1 of 2 rows of {name} have their prompt in 'messages'.",
        f"1 of 2 rows of {name} have their answer in 'reward_model.ground_truth'.",
    ]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "A whole text."}, r"item 2 .* has no column 'prompt'\. Columns there: 'text'\. .*Set prompt_column"),
        ({"messages": [assistant("yo")]}, r"item 2 .*'messages' holds messages of the assistant alone.*put a message of the user"),
        ({"messages": []}, r"item 2 .*'messages' is an empty list of messages; remove the row"),
        ({"conversations": [{"from": "me", "value": "hi"}]}, r"item 2 .*message 1 of 'conversations' is from 'me'; write one of human"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]},
            r"item 2 .*with a part that is type 'image'; only text can be distilled. Remove the part or the row",
        ),
        ({"prompt": [user("hi")], "completion": [user("hi")]}, r"item 2 .*'completion' is a list; it has to be text or null"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_the_row_the_reason_and_what_to_do(write, row, said):
    with pytest.raises(DataError, match=said):
        load_prompts(write([{"prompt": "fine"}, row], "json"))

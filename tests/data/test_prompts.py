import json
import sys
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.data.prompts import PromptSchedule, load_prompts
from opd.errors import ConfigError, DataError, MissingDependencyError
from opd.types import Prompt


@pytest.fixture
def write(tmp_path):
    """A JSONL file of these rows; a row that is text or bytes is written as it is."""

    def write(*rows, name="prompts.jsonl") -> str:
        lines = [
            row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
            for row in rows
        ]
        (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
        return str(tmp_path / name)

    return write


def refusal(path: str, error=DataError, **options) -> str:
    with pytest.raises(error) as caught:
        load_prompts(path, **options)
    return str(caught.value)


# What is read


def test_jsonl_rows_become_prompts_in_file_order_with_other_columns_in_metadata(write):
    path = write(
        {"prompt": "1+1=", "answer": "2", "response": "It is 2", "teacher": "maths", "level": 3, "tags": ["a"]},
        {"prompt": "2+2="},
    )
    assert load_prompts(path) == [
        Prompt(
            index=0,
            text="1+1=",
            answer="2",
            response="It is 2",
            teacher="maths",
            metadata={"level": 3, "tags": ["a"]},
        ),
        Prompt(index=1, text="2+2="),
    ]


def test_columns_can_have_other_names(write):
    path = write({"question": "q", "solution": "s", "reference": "r", "expert": "e", "prompt": "other"})
    (prompt,) = load_prompts(
        path,
        prompt_column="question",
        answer_column="solution",
        response_column="reference",
        teacher_column="expert",
    )
    assert (prompt.text, prompt.answer, prompt.response, prompt.teacher) == ("q", "s", "r", "e")
    assert prompt.metadata == {"prompt": "other"}


def test_messages_become_a_tuple_of_dicts(write):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    (prompt,) = load_prompts(write({"prompt": messages}))
    assert prompt.messages == tuple(messages)
    assert prompt.text is None


def test_tool_call_without_content_is_a_message(write):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    messages = [{"role": "user", "content": "1+1"}, call, {"role": "tool", "content": "2"}]
    assert load_prompts(write({"prompt": messages}))[0].messages == tuple(messages)


@pytest.mark.parametrize(
    ("value", "answer"), [(4, "4"), (4.0, "4"), (-0.5, "-0.5"), (10**20, str(10**20)), ("04", "04"), (None, None)]
)
def test_answers_that_are_numbers_become_text(write, value, answer):
    assert load_prompts(write({"prompt": "q", "answer": value}))[0].answer == answer


def test_limit_keeps_the_first_rows_and_reads_no_further(write):
    path = write({"prompt": "a"}, {"prompt": "b"}, "not json")
    assert [prompt.text for prompt in load_prompts(path, limit=2)] == ["a", "b"]


def test_line_separators_inside_a_text_do_not_end_the_row(write):
    path = write(json.dumps({"prompt": "a\u2028b\u0085c"}, ensure_ascii=False))
    assert load_prompts(path)[0].text == "a\u2028b\u0085c"


def test_byte_order_mark_and_windows_line_ends_are_read(write):
    path = write(b'\xef\xbb\xbf{"prompt": "a"}\r', b'{"prompt": "b"}\r', b"")
    assert [prompt.text for prompt in load_prompts(path)] == ["a", "b"]


def test_parquet_gives_the_same_prompts_as_jsonl(write, tmp_path):
    rows = [{"prompt": f"q{i}", "answer": str(i), "level": i} for i in range(3000)]
    file = tmp_path / "prompts.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert load_prompts(str(file)) == load_prompts(write(*rows))


def test_null_keys_that_parquet_adds_to_messages_are_dropped(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "hi"}, {"role": "user", "content": "you", "name": "Ada"}]}]
    file = tmp_path / "prompts.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert load_prompts(str(file))[0].messages == tuple(rows[0]["prompt"])


def test_saved_datasets_are_read_with_and_without_splits(write, tmp_path):
    datasets = pytest.importorskip("datasets")
    train, test = ([{"prompt": f"{split} {i}", "answer": i} for i in range(3)] for split in ("train", "test"))
    datasets.Dataset.from_list(train).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=datasets.Dataset.from_list(train), test=datasets.Dataset.from_list(test)).save_to_disk(
        tmp_path / "two"
    )
    assert load_prompts(str(tmp_path / "one")) == load_prompts(write(*train))
    assert load_prompts(str(tmp_path / "two"), split="test") == load_prompts(write(*test))
    assert "has no split 'dev'; set split to one of test, train" in refusal(str(tmp_path / "two"), split="dev")


def test_hub_name_config_and_split_reach_the_datasets_library(write, monkeypatch):
    calls = []

    class Datasets:
        @staticmethod
        def load_dataset(*args, **kwargs):
            calls.append((args, kwargs))
            return [{"prompt": "q"}]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    load_prompts("hub:openai/gsm8k/main", split="test")
    load_prompts("hub:owner/name")
    assert calls == [(("openai/gsm8k", "main"), {"split": "test"}), (("owner/name",), {"split": "train"})]


# What is refused


def test_missing_file_is_refused_with_the_nearest_name(write):
    path = write({"prompt": "q"})
    message = refusal(path.replace("prompts", "promts"))
    assert "does not exist; did you mean" in message and message.endswith("prompts.jsonl?")
    assert "check the path" in refusal("/nowhere/at/all.jsonl")


def test_missing_hub_like_path_points_to_the_hub_prefix():
    assert "write hub:owner/name" in refusal("owner/name")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_file_is_refused(write, content):
    assert "has no rows" in refusal(write(content))


def test_malformed_json_is_refused_with_its_line(write):
    message = refusal(write({"prompt": "a"}, '{"prompt": "b"'))
    assert "line 2 of" in message and "is not JSON" in message and '{"prompt": "b"' in message
    assert "line 1 of" in refusal(write("[" * 100_000))


def test_empty_line_is_refused_rather_than_skipped(write):
    assert "line 2 of" in refusal(write({"prompt": "a"}, "", {"prompt": "b"}))


@pytest.mark.parametrize(("row", "kind"), [([1], "a list"), ("3", "the number 3"), ("null", "null"), ('"a"', "text")])
def test_row_that_is_no_object_is_refused(write, row, kind):
    message = refusal(write({"prompt": "a"}, row))
    assert f"is {kind}, not an object" in message and "line 2" in message


def test_undecodable_bytes_are_refused_with_line_and_column(write):
    message = refusal(write({"prompt": "a"}, b'{"prompt": "caf\xe9"}'))
    assert "line 2 of" in message and "not UTF-8 (byte 0xe9 at column 16)" in message


def test_lone_surrogate_is_refused(write):
    assert "lone surrogate" in refusal(write('{"prompt": "\\ud800"}'))
    assert "lone surrogate" in refusal(write({"prompt": "a", "answer": "\ud800"}))
    assert "lone surrogate" in refusal(write({"prompt": [{"role": "user", "content": "\ud800"}]}))


def test_missing_prompt_column_is_refused_with_the_columns_and_the_nearest(write):
    message = refusal(write({"promt": "a", "answer": 1}))
    assert "line 1" in message and "no column 'prompt'" in message
    assert "Columns there: 'answer', 'promt'. Did you mean 'promt'? Set prompt_column" in message


def test_optional_column_that_was_named_but_is_in_no_row_is_refused(write):
    message = refusal(write({"prompt": "a", "solution": "1"}), answer_column="solutoin")
    assert (
        "answer column 'solutoin'" in message and "Did you mean 'solution'?" in message and "answer_column" in message
    )


@pytest.mark.parametrize(
    ("value", "kind"), [(3, "the number 3"), (None, "null"), (True, "true or false"), ({"a": 1}, "an object")]
)
def test_prompt_of_another_type_is_refused(write, value, kind):
    message = refusal(write({"prompt": "a"}, {"prompt": value}))
    assert "line 2 of" in message and f"'prompt' is {kind}; a prompt is text" in message


@pytest.mark.parametrize("value", ["", " \n", [], [{"role": "user", "content": " "}]])
def test_empty_prompt_is_refused(write, value):
    message = refusal(write({"prompt": value}))
    assert "line 1" in message and "empty" in message and "remove the row" in message


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("hi", "is text; write it as {'role': 'user'"),
        ({"content": "hi"}, "has no role"),
        ({"role": "", "content": "hi"}, "has no role"),
        ({"role": 3, "content": "hi"}, "has no role"),
        ({"role": "user"}, "has null as its content"),
        ({"role": "user", "content": [{"type": "image"}]}, "has a list as its content"),
    ],
)
def test_bad_message_is_refused_with_its_place(write, message, said):
    refused = refusal(write({"prompt": [{"role": "user", "content": "first"}, message]}))
    assert "line 1" in refused and "message 2 of 'prompt'" in refused and said in refused


def test_messages_of_the_assistant_alone_are_refused(write):
    message = refusal(write({"prompt": [{"role": "assistant", "content": "b"}]}))
    assert "messages of the assistant alone" in message and "nothing to answer" in message


@pytest.mark.parametrize("value", [[1], True, float("nan"), float("inf"), {"a": 1}])
def test_answer_that_is_neither_text_nor_number_is_refused(write, value):
    assert "an answer is text, a finite number, or null" in refusal(write({"prompt": "a", "answer": value}))


@pytest.mark.parametrize("column", ["response", "teacher"])
def test_response_and_teacher_have_to_be_text(write, column):
    assert f"'{column}' is the number 3; it has to be text or null" in refusal(write({"prompt": "a", column: 3}))


@pytest.mark.parametrize(("name", "suffix"), [("a.csv", "'.csv'"), ("a", "'no suffix'"), ("a.yaml", "'.yaml'")])
def test_other_file_formats_are_refused(write, name, suffix):
    message = refusal(write({"prompt": "a"}, name=name))
    assert suffix in message and ".jsonl" in message and ".parquet" in message and "hub:owner/name" in message


def test_folder_that_is_no_dataset_is_refused(tmp_path):
    assert "not one written by datasets' save_to_disk" in refusal(str(tmp_path))


def test_broken_parquet_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    assert "cannot be read as parquet" in refusal(str(tmp_path / "a.parquet"))


def test_bad_parquet_row_is_refused_with_its_number(tmp_path):
    table = pyarrow.table({"prompt": ["a", "b", None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert refusal(str(tmp_path / "a.parquet")).startswith(f"row 2 of {tmp_path / 'a.parquet'}: 'prompt' is null")


def test_empty_parquet_is_refused(tmp_path):
    table = pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "has no rows" in refusal(str(tmp_path / "a.parquet"))


def test_missing_extras_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").touch()
    (tmp_path / "state.json").touch()
    assert "pip install 'opd[parquet]'" in refusal(str(tmp_path / "a.parquet"), MissingDependencyError)
    assert "pip install 'opd[datasets]'" in refusal("hub:owner/name", MissingDependencyError)
    assert "pip install 'opd[datasets]'" in refusal(str(tmp_path), MissingDependencyError)


@pytest.mark.parametrize("path", ["hub:name", "hub:", "hub:a/b/c/d", "hub:a//b"])
def test_bad_hub_name_is_refused(path):
    assert "write hub:owner/name" in refusal(path)


def test_hub_failure_is_told_with_its_reason(monkeypatch):
    class Datasets:
        @staticmethod
        def load_dataset(*args, **kwargs):
            raise ValueError("Unknown split 'dev'")

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    message = refusal("hub:owner/name", split="dev")
    assert "hub:owner/name (split 'dev') cannot be loaded: Unknown split 'dev'" in message


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_below_one_is_refused(write, limit):
    assert f"limit={limit}" in refusal(write({"prompt": "a"}), ConfigError, limit=limit)


# The order


def prompts(size: int) -> list[Prompt]:
    return [Prompt(index=index, text=str(index)) for index in range(size)]


def indices(order: PromptSchedule, steps: range, count: int) -> list[int]:
    return [prompt.index for step in steps for prompt in order.take(step, count)]


@given(size=st.integers(1, 12), count=st.integers(1, 30), seed=st.integers(0, 2**40), shuffle=st.booleans())
def test_every_prompt_comes_once_per_epoch(size, count, seed, shuffle):
    order = PromptSchedule(prompts(size), seed, shuffle)
    epochs = 3
    taken = indices(order, range(-(-epochs * size // count)), count)
    for epoch in range(epochs):
        assert Counter(taken[epoch * size : (epoch + 1) * size]) == Counter(range(size))


@given(st.permutations(range(6)))
def test_take_depends_on_the_step_alone_and_not_on_what_was_taken_before(steps):
    in_order = PromptSchedule(prompts(5), seed=7)
    expected = {step: in_order.take(step, 4) for step in range(6)}
    resumed = PromptSchedule(prompts(5), seed=7)
    assert {step: resumed.take(step, 4) for step in steps} == expected


def test_seeds_and_epochs_have_orders_of_their_own():
    first = indices(PromptSchedule(prompts(50), seed=0), range(2), 50)
    other = indices(PromptSchedule(prompts(50), seed=1), range(2), 50)
    assert first[:50] != first[50:]
    assert first[:50] != other[:50]
    assert first[50:] != other[:50]


def test_order_is_the_same_on_every_machine():
    assert indices(PromptSchedule(prompts(8), seed=0), range(1), 8) == [0, 2, 1, 4, 6, 7, 3, 5]


def test_unshuffled_order_is_file_order_over_and_over():
    assert indices(PromptSchedule(prompts(3), seed=0, shuffle=False), range(2), 4) == [0, 1, 2, 0, 1, 2, 0, 1]


def test_an_order_of_nothing_is_refused():
    with pytest.raises(DataError, match="no prompts to take"):
        PromptSchedule([], seed=0)

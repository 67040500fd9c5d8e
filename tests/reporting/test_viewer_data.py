"""Samples as the page holds them: exact where it matters, small, and honest about what is left out."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest

from opd.reporting.files import strict_json
from opd.reporting.viewer import LIKELIEST_KEPT, MAX_BYTES, viewer_css, viewer_data, viewer_script
from reporting.report_inputs import a_sample
from reporting.token_details import detailed


def data_of(*samples, **options) -> dict[str, Any]:
    view = viewer_data(samples, **options)
    assert view is not None
    return view["data"]


def size(data: dict[str, Any]) -> int:
    return len(json.dumps(strict_json(data), allow_nan=False, separators=(",", ":")))


def test_without_samples_there_is_no_viewer():
    assert viewer_data([]) is None


def test_a_sample_holds_its_numbers_to_four_digits():
    record = detailed((" 24", " 41"), kl=(0.123456, 5.0), wanted=(" 24", " 42"))
    data = data_of(record)
    (sample,) = data["samples"]
    assert [data["texts"][i] for i in sample["tokens"]] == [" 24", " 41"]
    assert sample["reverse_kl"] == [0.1235, 5]
    assert sample["student_logp"] == [round(1000 * math.log(0.9)), round(1000 * math.log(0.4))]
    assert sample["teacher_logp"][1] == round(1000 * math.log(0.003))
    assert sample["student_entropy"] == [400, 1600]
    first, share, *_ = sample["teacher_top"][1]
    assert (data["texts"][first], share) == (" 42", 8000)


def test_a_text_stands_once():
    data = data_of(*(detailed((" a", " b", " a"), step=step) for step in range(5)))
    assert len(data["texts"]) == len(set(data["texts"]))
    assert len(data["prompts"]) == 1


def test_what_was_not_recorded_is_absent_and_nan_is_null():
    old = data_of(a_sample(reverse_kl=(math.nan, 1.0)))["samples"][0]
    assert old["reverse_kl"] == [None, 1]
    assert not {"student_logp", "teacher_top", "joined", "response"} & old.keys()
    assert "reverse_kl" not in data_of(a_sample(reverse_kl=None))["samples"][0]
    assert data_of(a_sample(tokens=(), response="as text"))["samples"][0]["response"] == "as text"


def test_a_sample_is_numbered_as_its_line_in_the_file():
    samples = [a_sample(step, prompt_index=0) for step in range(9)]
    assert [s["n"] for s in data_of(*samples)["samples"]] == list(range(1, 10))
    few = data_of(*samples, max_bytes=700)["samples"]
    assert [s["n"] for s in few] == [s["step"] + 1 for s in few]


def test_a_large_run_keeps_the_first_the_last_and_evenly_spaced_steps_of_each_prompt():
    samples = [
        detailed(tuple(f" w{i}" for i in range(120)), step=step, prompt=f"prompt {row}", prompt_index=row)
        for step in range(0, 330, 10)
        for row in range(4)
    ]
    view = viewer_data(samples)
    assert view is not None
    data = view["data"]
    assert size(data) <= MAX_BYTES + 1500  # of the scales
    assert size(data) > 0.8 * MAX_BYTES
    for row in range(4):
        steps = [s["step"] for s in data["samples"] if s["row"] == f"eval {row}"]
        assert {0, 320} <= set(steps)
        gaps = [b - a for a, b in itertools.pairwise(steps)]
        assert len(steps) >= 5 and max(gaps) <= 3 * min(gaps)
    assert view["left_out"] is not None and f"{len(data['samples'])} of 132" in view["left_out"]


def test_training_prompts_asked_once_do_not_crowd_out_the_evaluations():
    train = [
        detailed((" a",) * 50, step=step, phase="train", prompt=f"p{step}", prompt_index=step) for step in range(400)
    ]
    evaluations = [detailed((" a",) * 50, step=step, prompt_index=0) for step in (0, 100, 200, 300, 399)]
    shown = data_of(*train, *evaluations, max_bytes=200_000)["samples"]
    assert len([s for s in shown if s["phase"] == "eval"]) == 5
    steps = sorted(s["step"] for s in shown if s["phase"] == "train")
    assert steps[0] == 0 and steps[-1] == 399


def test_a_long_response_keeps_the_likeliest_tokens_where_it_cost_most():
    kl = tuple(float(i % 100) for i in range(10_000))
    (sample,) = data_of(detailed(tuple(f" w{i % 50}" for i in range(10_000)), kl=kl))["samples"]
    kept = [i for i, row in enumerate(sample["teacher_top"]) if row]
    assert len(kept) == LIKELIEST_KEPT and min(kl[i] for i in kept) >= 85
    assert len(sample["tokens"]) == len(sample["student_logp"]) == 10_000


def test_one_sample_is_shown_however_large():
    assert len(data_of(detailed((" a",) * 100), max_bytes=10)["samples"]) == 1


def test_student_and_teacher_answer_one_prompt_whatever_each_reads():
    student = a_sample(0, "<s>q", prompt_index=4)
    teacher = a_sample(0, "<|user|>q", prompt_index=4, who="teacher", source="teacher")
    first, second = data_of(student, teacher)["samples"]
    assert first["row"] == second["row"] and (first["by"], second["by"]) == ("student", "teacher")
    assert first["prompt"] != second["prompt"]
    assert data_of(a_sample(source="dataset"))["samples"][0]["by"] == "dataset"
    assert first["row"] != data_of(a_sample(0, prompt_index=4, phase="train"))["samples"][0]["row"]


def test_a_prompt_is_cut_at_its_special_tokens_and_listed_by_what_is_its_own():
    samples = [
        a_sample(
            0,
            f"<u>Solve it. {words} Be brief.<e>",
            prompt_index=i,
            special=((0, 3), (len(words) + 23, len(words) + 26)),
        )
        for i, words in enumerate(("What is 1 + 1?", "What is 20 − 7?"))
    ]
    prompts = data_of(*samples)["prompts"]
    assert prompts[0]["pieces"] == [["<u>", 1], ["Solve it. What is 1 + 1? Be brief.", 0], ["<e>", 1]]
    assert [prompt["brief"] for prompt in prompts] == ["1 + 1?", "20 − 7?"]


def test_hidden_characters_are_shown_wherever_they_stand():
    hostile = "a\u202eb\x1b"
    sample = detailed(
        ("x",), prompt=hostile, answer=hostile, teacher=hostile, response=hostile, joined=((0, 1, hostile),)
    )
    view = viewer_data([sample, a_sample(tokens=(), response=hostile, prompt="other")])
    text = json.dumps(view, ensure_ascii=False)
    assert "\u202e" not in text and "\\u001b" not in text
    assert text.count("a⟨U+202E⟩b⟨U+001B⟩") >= 6


def test_the_plain_list_ends_and_says_how_many_are_missing():
    view = viewer_data([a_sample(step, response="x" * 20_000, prompt_index=0) for step in range(10)])
    assert view is not None
    assert len(view["plain"]) == 2 and view["plain_left_out"] == 8


@pytest.mark.parametrize("asset", [viewer_css(), viewer_script()])
def test_the_viewer_asks_for_nothing_and_evaluates_nothing(asset):
    for word in (
        "http:",
        "https:",
        "url(",
        "@import",
        "fetch(",
        "XMLHttpRequest",
        "import(",
        "eval(",
        "new Function",
        "innerHTML",
    ):
        assert word not in asset

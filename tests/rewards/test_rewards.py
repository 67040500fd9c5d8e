import re
import signal
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.errors import ConfigError, DataError
from opd.rewards import Scorer, exact_match, load_reward, numeric_answer, regex_answer, score_reward
from opd.types import Prompt


def prompt(answer: str | None) -> Prompt:
    return Prompt(index=7, text="q", answer=answer)


# exact_match


def test_exact_match_ignores_white_space_around_and_nothing_else():
    assert exact_match(prompt("a b"), " a b\n") == 1.0
    assert exact_match(prompt("a b"), "a  b") == 0.0
    assert exact_match(prompt("a"), "A") == 0.0


# numeric_answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The answer is 42.", "42"),
        ("First 7, then 42", "42"),
        ("42", "The solution\n#### 42"),
        ("42.0", "42"),
        ("1,234,567.5", "1234567.5"),
        ("$1{,}234$", "1234"),
        ("That costs $1,234.50!", "1234.5"),
        ("-5", "-5"),
        ("x=-5", "-5"),
        ("\\boxed{-5}", "-5"),
        ("\N{MINUS SIGN}5", "-5"),
        ("-$5", "-5"),
        ("+5", "5"),
        ("3-5", "5"),
        ("10 - 5", "5"),
        (".5", "0.5"),
        ("1/2", "0.5"),
        ("3 / 4", "0.75"),
        ("-3/4", "-0.75"),
        ("\\frac{3}{4}", "0.75"),
        ("-\\dfrac{1}{2}", "-1/2"),
        ("1e3", "1000"),
        ("2.5E-1", "1/4"),
        ("50%", "50"),
        ("50%", "0.5"),
        ("0.5", "50 %"),
        ("50\\%", "50%"),
        ("about 3 apples", "3"),
        ("**42**", "42"),
        ("答案是42", "42"),
        ("1,2,3", "3"),
    ],
)
def test_numeric_answer_reads(response, answer):
    assert numeric_answer(prompt(answer), response) == 1.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("42 or 43", "42"),
        ("", "42"),
        ("none", "42"),
        ("-5", "5"),
        ("5", "-5"),
        ("1234", "1.234"),
        ("50", "0.5"),
        ("0.5", "50"),
        ("50%", "0.5%"),
        ("1/3", "0.333"),
        ("1/0", "1"),
        ("CO2", "2"),
        ("9" * 5000, "9"),
        ("1e999999999999", "1"),
        ("1/1e-99999999999", "1"),
    ],
)
def test_numeric_answer_refuses(response, answer):
    assert numeric_answer(prompt(answer), response) == 0.0


@given(st.integers(-(10**12), 10**12))
def test_any_integer_equals_itself_however_it_is_written(number):
    for written in (f"{number}", f"{number:,}", f"{number}.00", f"so {number}.", f"{2 * number}/2"):
        assert numeric_answer(prompt(str(number)), written) == 1.0
    assert numeric_answer(prompt(str(number)), str(number + 1)) == 0.0


@given(st.text(max_size=200))
def test_numeric_answer_survives_any_response(response):
    assert numeric_answer(prompt("1"), response) in (0.0, 1.0)


def test_an_answer_without_a_number_is_refused():
    with pytest.raises(DataError, match=r"answer of prompt 7 is 'Paris', which holds no number"):
        numeric_answer(prompt("Paris"), "3")


# regex


def test_regex_compares_the_last_match_of_the_group_with_the_answer():
    reward = load_reward(r"regex:####\s*(\S+)")
    assert reward(prompt("42"), "#### 41\n#### 42 done") == 1.0
    assert reward(prompt("41"), "#### 41\n#### 42 done") == 0.0
    assert reward(prompt("42"), "42") == 0.0


def test_regex_without_a_group_compares_the_whole_match():
    assert regex_answer("yes|no")(prompt("no"), "yes, no") == 1.0


def test_regex_group_that_took_no_part_is_no_match():
    assert regex_answer("a(b)?")(prompt("b"), "ab a") == 0.0


@pytest.mark.parametrize(
    ("spec", "said"),
    [("regex:(", "not a regular expression"), ("regex:", "no pattern"), ("regex:(a)(b)", "has 2 groups")],
)
def test_unusable_patterns_are_refused(spec, said):
    with pytest.raises(ConfigError, match=said):
        load_reward(spec)


@pytest.mark.parametrize("spec", ["exact_match", "numeric_answer", "regex:(.+)"])
def test_a_prompt_without_an_answer_is_refused_by_row_and_reward(spec):
    with pytest.raises(DataError) as error:
        score_reward(load_reward(spec), prompt(None), "3")
    assert f"prompt 7 has no answer, which reward {spec!r}" in str(error.value)


# One's own


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module of one's own and make it importable."""

    def write(source: str) -> str:
        (tmp_path / "own_rewards.py").write_text(textwrap.dedent(source))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
        return "own_rewards"

    yield write
    sys.modules.pop("own_rewards", None)


def refusal(spec: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_reward(spec)
    return str(error.value)


def test_a_function_of_ones_own_is_found_by_its_dotted_path(module):
    name = module("def length(prompt, response, scale=2): return scale * len(response)")
    assert score_reward(load_reward(f"{name}:length"), prompt(None), "abc") == 6.0


def test_built_in_names_give_the_functions():
    assert load_reward("exact_match") is exact_match
    assert load_reward("numeric_answer") is numeric_answer


@pytest.mark.parametrize("spec", ["numeric_anwser", "", "package.module.function", ":f", "module:"])
def test_unknown_names_are_refused_with_what_there_is(spec):
    message = refusal(spec)
    assert f"no reward {spec!r}" in message
    assert (
        "exact_match, numeric_answer, math_verify, reasoning_gym, regex:<pattern>, or package.module:function"
        in message
    )


def test_a_misspelt_name_gets_the_nearest():
    assert "Did you mean 'numeric_answer'?" in refusal("numeric_anwser")


def test_a_module_that_cannot_be_imported_is_refused_with_the_reason(module):
    assert "No module named 'no_such_module'" in refusal("no_such_module:f")
    assert "PYTHONPATH=." in refusal("no_such_module:f")
    name = module("1 / 0")
    assert f"importing {name!r} failed (ZeroDivisionError: division by zero)" in refusal(f"{name}:f")


def test_a_function_that_is_not_there_is_refused_with_the_nearest(module):
    name = module("def length(prompt, response): return 1.0")
    assert f"module {name!r} has no 'lenght'; did you mean 'length'?" in refusal(f"{name}:lenght")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("f = 3", "has the type int and is not a function"),
        ("def f(response): return 1.0", r"takes (response), but a reward is called as reward(prompt, response)"),
        ("def f(prompt, response, extra): return 1.0", "missing a required argument: 'extra'"),
        ("async def f(prompt, response): return 1.0", "is async"),
    ],
)
def test_what_cannot_be_called_as_a_reward_is_refused(module, source, said):
    assert said in refusal(f"{module(source)}:f")


def test_a_reward_that_raises_names_the_row_the_error_and_the_response():
    def broken(prompt, response):
        raise KeyError("gold")

    with pytest.raises(DataError) as error:
        score_reward(broken, prompt("1"), "x" * 500)
    message = str(error.value)
    assert "reward 'broken' failed on prompt 7: KeyError: 'gold'" in message
    assert "x" * 80 + "…" in message and "x" * 81 not in message
    assert isinstance(error.value.__cause__, KeyError)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), None, "1.0", [1.0], 1j])
def test_a_reward_that_is_no_finite_number_names_the_row(value):
    with pytest.raises(DataError, match="for prompt 7, which is not a finite number"):
        score_reward(lambda prompt, response: value, prompt("1"), "a")


@pytest.mark.parametrize("value", [1, True, 1.0])
def test_numbers_of_any_kind_become_floats(value):
    reward = score_reward(lambda prompt, response: value, prompt("1"), "a")
    assert type(reward) is float and reward == 1.0


def test_arrays_of_several_values_are_refused():
    import numpy
    import torch

    for value in (numpy.ones(2), torch.ones(2)):
        with pytest.raises(DataError, match="not a finite number"):
            score_reward(lambda prompt, response, value=value: value, prompt("1"), "a")


def test_numpy_and_torch_scalars_become_floats():
    import numpy
    import torch

    for value in (numpy.float32(0.5), torch.tensor(0.5)):
        assert score_reward(lambda prompt, response, value=value: value, prompt("1"), "a") == 0.5


# Time


def endless(prompt, response):
    while True:
        pass


def stubborn(prompt, response):
    """Swallows what an alarm in the form of an Exception would be."""
    while True:
        with suppress(Exception):
            time.sleep(1)


def backtracking(prompt, response):
    return float(bool(re.match(r"(a+)+$", "a" * 40 + "b")))


@pytest.mark.serial
@pytest.mark.parametrize("reward", [endless, stubborn, backtracking])
def test_a_reward_that_hangs_is_interrupted_and_named(reward):
    began = time.monotonic()
    with pytest.raises(DataError, match=rf"'{reward.__name__}' gave no answer within 0.1 s for prompt 7"):
        score_reward(reward, prompt("1"), "a", timeout=0.1)
    assert time.monotonic() - began < 5


def test_a_time_limit_puts_back_the_timer_it_found():
    before = signal.setitimer(signal.ITIMER_REAL, 50)
    try:
        assert score_reward(lambda prompt, response: 1.0, prompt("1"), "a", timeout=5) == 1.0
        assert 40 < signal.getitimer(signal.ITIMER_REAL)[0] <= 50
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)


def test_a_time_limit_holds_outside_the_main_thread_too():
    def endless(prompt, response):
        while True:
            time.sleep(0.01)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(score_reward, exact_match, prompt("1"), "1", timeout=1.0).result() == 1.0
        assert pool.submit(score_reward, exact_match, prompt("1"), "1").result() == 1.0
        with pytest.raises(DataError, match=r"'endless' gave no answer within 0.1 s.*raise reward.timeout"):
            pool.submit(score_reward, endless, prompt("1"), "1", timeout=0.1).result()
        with pytest.raises(DataError, match="has no answer"):
            pool.submit(score_reward, exact_match, prompt(None), "1", timeout=1.0).result()


def test_failures_are_counted_as_0_only_where_that_is_asked_for():
    def picky(prompt, response):
        return 1 / len(response)

    answered = [(prompt("1"), "a"), (prompt("1"), ""), (prompt("1"), "ab")]
    scores = Scorer(reward=picky, on_error="zero").score(answered)
    assert scores.values == (1.0, 0.0, 0.5)
    (failure,) = scores.failures
    assert "ZeroDivisionError" in failure
    with pytest.raises(DataError, match="ZeroDivisionError"):
        Scorer(reward=picky).score(answered)


# Boxes


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("\\boxed{3} out of 4 apples", "3"),
        ("$\\boxed{42}$, which is 100% sure.", "42"),
        ("\\boxed{1}, no: \\boxed{2}.", "2"),
        ("\\boxed{42}, as asked in \\boxed{}", "42"),
        ("\\boxed{\\frac{3}{4}}", "0.75"),
        ("\\boxed{1\\frac12}", "1.5"),
        ("\\boxed{12\\text{ cm}^2}", "12"),
        ("\\boxed{45^\\circ}", "45"),
        ("\\boxed{\\text{12 apples}}", "12"),
        ("\\boxed{x = 12}", "12"),
        ("\\boxed 7 of 8", "7"),
        ("\\fbox{7} of 8", "7"),
        ("so \\boxed{42", "42"),
        ("it is 5", "The sum is \\boxed{5} of 6."),
    ],
)
def test_the_number_in_the_last_box_is_the_answer(response, answer):
    assert numeric_answer(prompt(answer), response) == 1.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("\\boxed{3} out of 4 apples", "4"),
        ("\\boxed{A}, 4", "4"),
        ("\\boxed{\\sqrt{2}}", "2"),
        ("\\boxed{2\\pi}", "2"),
        ("\\boxed{2^{10}}", "10"),
    ],
)
def test_a_box_that_holds_another_value_is_not_the_answer(response, answer):
    assert numeric_answer(prompt(answer), response) == 0.0


@pytest.mark.serial
def test_many_open_boxes_take_no_time():
    began = time.monotonic()
    assert numeric_answer(prompt("1"), "\\boxed{" * 20_000 + "1") == 1.0
    assert time.monotonic() - began < 2


# Responses cut off at the length limit


@pytest.mark.parametrize(
    "response",
    [
        "no ah has 12 more ;) Sorry, we're an AI",
        "so we get 6 + 6 = 12",
        "The answer is 12",
        "The answer is 12.",
        "the next answer: 12",
        "#### 12",
        "\\boxed{12",
        "#### 12. Next",
        "12 apples",
    ],
)
def test_a_response_that_was_cut_before_it_gave_its_answer_is_not_right(response):
    assert numeric_answer(prompt("12"), response, finished=False) == 0.0
    assert numeric_answer(prompt("12"), response) == 1.0


@pytest.mark.parametrize(
    "response",
    [
        "\\boxed{12}",
        "\\boxed{12}. Let me check: 7",
        "The answer is 12. Let me check: 7",
        "**Answer:** $12$ because 7",
        "Final answer = 12, as 7",
        "#### 12\nNext question: 7",
        "12",
        " -$12.00\n".replace("-", ""),
    ],
)
def test_a_response_that_gave_its_answer_before_it_was_cut_is_right(response):
    assert numeric_answer(prompt("12"), response, finished=False) == 1.0


def test_a_find_of_a_pattern_that_reaches_the_cut_may_be_half_of_one():
    reward = load_reward(r"regex:####\s*(\d+)")
    assert score_reward(reward, prompt("4"), "#### 4", finished=False) == 0.0
    assert score_reward(reward, prompt("4"), "#### 4", finished=True) == 1.0
    assert score_reward(reward, prompt("4"), "#### 4\n", finished=False) == 1.0
    assert score_reward(reward, prompt("4"), "#### 4\n#### 5", finished=False) == 1.0
    assert score_reward(load_reward("regex:[AB]"), prompt("A"), "A", finished=False) == 1.0


def test_a_reward_that_asks_is_told_whether_the_response_finished():
    def own(prompt, response, finished=True):
        return float(finished)

    answered = [(prompt("1"), "a"), (prompt("1"), "b")]
    assert Scorer(reward=own).score(answered, [True, False]).values == (1.0, 0.0)
    assert Scorer(reward=own).score(answered).values == (1.0, 1.0)
    assert Scorer(reward=lambda prompt, response: 0.5, timeout=1.0).score(answered, [False, False]).values == (0.5, 0.5)

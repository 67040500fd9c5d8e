"""math_verify and reasoning_gym: rewards that ask a package of somebody else's."""

import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest

from opd.errors import DataError, MissingDependencyError
from opd.rewards import Scorer, load_reward, score_reward
from opd.rewards.boxes import last_tag
from opd.types import Prompt

needs_math_verify = pytest.mark.skipif(find_spec("math_verify") is None, reason="math-verify is not installed")


def prompt(answer: str | None, **metadata) -> Prompt:
    return Prompt(index=7, text="q", answer=answer, metadata=metadata)


@needs_math_verify
@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"So \boxed{\frac{2}{4}}.", "1/2"),
        (r"So \boxed{\sqrt{8}}.", r"2\sqrt{2}"),
        (r"First \boxed{3}, then \boxed{(1, 2)}", "(1,2)"),
        (r"\boxed{x^2 - 1}", "$(x-1)(x+1)$"),
        (r"\boxed{\frac{1}{\sqrt{3}}}", r"\frac{\sqrt{3}}{3}"),
        (r"\boxed{\{2, 1\}}", r"\{1,2\}"),
        (r"\boxed{1{,}000}", "1000"),
        ("The final answer is $7$.", r"Long work, so \boxed{7}."),
        ("The answer is 72", "She has 5.\n#### 72"),
    ],
)
def test_math_verify_finds_equal_what_is_equal(response, answer):
    assert score_reward(load_reward("math_verify"), prompt(answer), response) == 1.0


@needs_math_verify
@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"So \boxed{2}, or \boxed{3}", "2"),  # the last box is the answer
        (r"It could be 2, but \boxed{3}", "2"),
        (r"\boxed{\sqrt{2}}", "1.4"),
        ("no number", "2"),
        ("", "2"),
        (r"\boxed{2", "3"),
    ],
)
def test_math_verify_refuses_what_is_not(response, answer):
    assert score_reward(load_reward("math_verify"), prompt(answer), response) == 0.0


@needs_math_verify
def test_a_response_that_was_cut_needs_a_closed_box():
    reward = load_reward("math_verify")
    assert score_reward(reward, prompt("2"), "The answer is 2", finished=False) == 0.0
    assert score_reward(reward, prompt("2"), "The answer is 2", finished=True) == 1.0
    assert score_reward(reward, prompt("2"), r"\boxed{2} as 3 - ", finished=False) == 1.0


@needs_math_verify
def test_math_verify_is_limited_by_opds_own_time_limit_in_every_thread():
    """math-verify's own limits raise outside the main thread; a product of primes takes sympy far longer than the limit."""
    scorer = Scorer(reward=load_reward("math_verify"), timeout=0.5, on_error="zero")
    hard = rf"\boxed{{{10**60 + 7}! }}"
    answered = [(prompt("2"), r"\boxed{2}"), (prompt(str(10**40)), hard)]

    def both():
        scores = scorer.score(answered)
        return scores.values, ["no answer within 0.5 s" in failure for failure in scores.failures]

    load_reward("math_verify")(*answered[0])  # imports sympy
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(both).result(timeout=30) == ((1.0, 0.0), [True])
    assert both() == ((1.0, 0.0), [True])


@needs_math_verify
def test_an_answer_that_is_no_mathematics_is_refused_by_its_row():
    with pytest.raises(DataError, match=r"the answer of prompt 7 is ' ', which math-verify cannot read; fix the row"):
        score_reward(load_reward("math_verify"), prompt(" "), "2")
    with pytest.raises(DataError, match="prompt 7 has no answer, which reward 'math_verify'"):
        score_reward(load_reward("math_verify"), prompt(None), "2")


def test_a_missing_math_verify_is_told_when_the_reward_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.setattr("opd.rewards.math_verify.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"math-verify, which is not installed; pip install 'opd\[math\]'"):
        load_reward("math_verify")


def test_the_last_answer_tag_is_read_without_its_white_space():
    assert last_tag("<answer>1</answer> no: <answer>\n 2\n</answer>") == "2"
    assert last_tag("<answer>1") is None


def test_a_prompt_that_is_no_task_is_refused_with_the_path_to_set():
    with pytest.raises(
        DataError, match=r"prompt 7 is no task of reasoning-gym.*set prompts.path to reasoning_gym:NAME"
    ):
        score_reward(load_reward("reasoning_gym"), prompt("1"), "1")

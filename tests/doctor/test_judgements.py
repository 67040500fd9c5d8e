"""The doctor's verdicts from numbers that a pencil can check."""

from __future__ import annotations

import math
from typing import Any

import pytest

from opd.doctor.check import Check
from opd.doctor.reward import check_reward
from opd.doctor.start import Answers, Distance, check_distance, check_lengths, check_task
from opd.doctor.stop_mass import Ends, check_stop_mass


def reward(**more: Any) -> Check:
    options: dict[str, Any] = {"seconds": 0.001, "failures": [], "name": "mine", "rewarded": True}
    return check_reward([0.0, 1.0, 0.0], [1.0, 1.0, 0.0], **options | more)


def test_rewards_that_are_alike_within_every_group_are_yellow_though_they_differ_between_groups():
    assert reward(groups=[(0.0, 0.0), (1.0, 1.0)]).verdict == "yellow"
    assert reward(groups=[(0.0, 0.0), (1.0, 0.0)]).verdict == "green"
    assert reward(groups=[(0.0, 0.0), (1.0, 0.0)]).numbers["groups without signal"] == "1 of 2"


def test_a_slow_reward_is_yellow_with_its_time():
    check = reward(seconds=2.5)
    assert check.verdict == "yellow" and "takes 2.5 s" in check.seen and check.numbers["ms per call"] == 2500
    assert reward(seconds=0.9).verdict == "green"


def test_a_failure_of_a_reward_comes_before_everything_else():
    assert reward(failures=["it broke"], seconds=9.0).seen == "1 of 6 calls failed and count as 0: it broke"


@pytest.mark.parametrize(
    ("truncated", "repetition", "teacher", "verdict", "words"),
    [
        (0.0, 0.1, 0.0, "green", "end by themselves"),
        (0.2, 0.1, 0.0, "green", "end by themselves"),
        (0.3, 0.1, 0.0, "yellow", "never ends"),
        (0.3, 0.1, 0.5, "yellow", "are cut off at"),
        (0.3, 0.1, None, "yellow", "are cut off at"),
        (1.0, 0.1, 0.0, "red", "never ends"),
        (1.0, 0.1, 1.0, "red", "are cut off at"),
        (0.0, 0.6, 0.0, "yellow", "repeats itself: 60%"),
    ],
)
def test_lengths(truncated: float, repetition: float, teacher: float | None, verdict: str, words: str):
    student = Answers(truncated=truncated, mean_length=5, repetition=repetition)
    other = None if teacher is None else Answers(truncated=teacher, mean_length=4, repetition=0)
    check = check_lengths(student, other, 8)
    assert check.verdict == verdict and words in check.seen
    assert bool(check.mend) == (verdict != "green")


def test_the_initial_distance_has_the_interval_of_its_mean():
    check = check_distance(Distance(reverse_kl=[1.0, 3.0], overlap=[0.5, 0.5]))
    mean, low, high = check.numbers["reverse KL"]  # pyright: ignore[reportGeneralTypeIssues]
    half = 12.706 * math.sqrt(2) / math.sqrt(2)  # t of one degree of freedom, times s / √n
    assert (mean, low, high) == pytest.approx((2.0, 2.0 - half, 2.0 + half), abs=1e-3)
    assert check.verdict == "green" and "forward KL" not in check.numbers
    assert check_distance(Distance(overlap=[0.39])).verdict == "yellow"


def test_a_teacher_that_wins_on_every_prompt_is_better_and_one_that_loses_is_worse():
    right, wrong = [1.0] * 20, [0.0] * 20
    assert check_task(wrong, right, reward="r").verdict == "green"
    assert check_task(right, wrong, reward="r").verdict == "red"
    assert check_task(right, right, reward="r").verdict == "yellow"
    assert check_task(wrong, right, reward="r", cooler=right).verdict == "yellow"
    assert check_task(wrong, right, reward="r", cooler=wrong).verdict == "green"


def test_rewards_that_are_no_pass_or_fail_are_compared_by_their_mean():
    check = check_task([0.2, 0.4, 0.3], [0.7, 0.9, 0.8], reward="r")
    assert check.verdict == "green" and check.numbers["difference"] == pytest.approx((0.5, 0.5, 0.5))


def ends(student: dict[int, float], teacher: dict[int, float], **more: Any) -> Check:
    return check_stop_mass(at_ends(student, teacher, **more), truncated=0.0)


def at_ends(student: dict[int, float], teacher: dict[int, float], **more: Any) -> Ends:
    options: dict[str, Any] = {"student_eos": [7, 8], "teacher_eos": [7, 8], "count": 5, "tokens": {7: "<a>", 8: "<b>"}}
    return Ends(student=student, teacher=teacher, **options | more)


@pytest.mark.parametrize(
    ("student", "teacher", "verdict"),
    [
        ({7: 0.9, 8: 0.1}, {7: 0.8, 8: 0.1}, "green"),
        ({7: 0.1, 8: 0.9}, {7: 0.9, 8: 0.0}, "red"),
        ({7: 0.1, 8: 0.1}, {7: 0.9, 8: 0.0}, "green"),  # shares ½ apart
        ({7: 0.05, 8: 0.01}, {7: 0.9, 8: 0.0}, "yellow"),
        ({7: 0.0, 8: 0.0}, {7: 0.3, 8: 0.0}, "green"),  # the teacher seldom ends there
    ],
)
def test_the_ends_that_two_models_use(student: dict[int, float], teacher: dict[int, float], verdict: str):
    assert ends(student, teacher).verdict == verdict


def test_the_ends_are_named_on_both_sides_and_so_is_whether_they_were_declared_alike():
    seen = ends({7: 0.1, 8: 0.9}, {7: 0.9, 8: 0.0}).seen
    assert seen == "The teacher ends with '<a>' (7) and the student with '<b>' (8), though both declare the same ids."
    assert "declare" not in ends({7: 0.1, 8: 0.9}, {7: 0.9, 8: 0.0}, student_eos=[8]).seen

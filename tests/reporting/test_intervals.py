from __future__ import annotations

import math
import random
import statistics

import pytest

from opd.reporting.intervals import mean_interval, student_t_quantile, wilson_interval


def test_wilson_interval_matches_the_textbook_value():
    # 8 of 10 at 95 %: (0.8 + 0.19207 ± 1.95996·√(0.016 + 0.0096037)) / 1.38415 = 0.49016 … 0.94332
    low, high = wilson_interval(8, 10)
    assert low == pytest.approx(0.49016, abs=1e-5)
    assert high == pytest.approx(0.94332, abs=1e-5)


def test_wilson_interval_without_a_success_is_z2_over_n_plus_z2():
    z2 = 1.959964**2
    assert wilson_interval(0, 10) == (0.0, pytest.approx(z2 / (10 + z2), abs=1e-6))


def test_wilson_interval_of_failures_mirrors_that_of_successes():
    low, high = wilson_interval(3, 17)
    assert wilson_interval(14, 17) == (pytest.approx(1 - high), pytest.approx(1 - low))


def test_wilson_interval_of_no_trial_is_everything():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_a_higher_level_gives_a_wider_interval():
    narrow, wide = wilson_interval(5, 20, level=0.5), wilson_interval(5, 20, level=0.99)
    assert wide[0] < narrow[0] < 0.25 < narrow[1] < wide[1]


@pytest.mark.parametrize(("successes", "n", "level"), [(3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0), (1, 2, 0.0)])
def test_impossible_counts_and_levels_are_refused(successes, n, level):
    with pytest.raises(ValueError, match="must lie between"):
        wilson_interval(successes, n, level)


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227), (120, 1.97993)],
)
def test_t_quantiles_match_the_printed_table(degrees, quantile):
    assert student_t_quantile(0.975, degrees) == pytest.approx(quantile, abs=6e-5)


def test_t_quantiles_of_one_and_two_degrees_have_a_closed_form():
    p = 0.995
    assert student_t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9)
    assert student_t_quantile(p, 2) == pytest.approx((2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p))), rel=1e-9)


def test_the_step_from_t_to_normal_is_below_a_quarter_percent():
    assert student_t_quantile(0.975, 999) == pytest.approx(student_t_quantile(0.975, 1000), rel=0.0025)


def test_mean_interval_of_three_numbers():
    # mean 2, s = 1, t_2 = 4.30265: 2 ± 4.30265/√3
    low, high = mean_interval([1.0, 2.0, 3.0])
    assert (low, high) == (pytest.approx(2 - 2.48414, abs=1e-5), pytest.approx(2 + 2.48414, abs=1e-5))


def test_equal_values_leave_no_doubt():
    assert mean_interval([0.5] * 10) == (0.5, 0.5)


@pytest.mark.parametrize("values", [[], [3.0]])
def test_too_few_values_say_nothing_about_the_spread(values):
    assert mean_interval(values) == (-math.inf, math.inf)


def test_mean_interval_covers_the_truth_as_often_as_it_says():
    rng = random.Random(0)
    hits = 0
    for _ in range(1000):
        low, high = mean_interval([rng.gauss(5, 2) for _ in range(4)])
        hits += low < 5 < high
    # Binomial(1000, 0.95) has a standard deviation of 6.9; the normal quantile would give about 855.
    assert hits == pytest.approx(950, abs=4 * statistics.NormalDist(950, 6.9).stdev)

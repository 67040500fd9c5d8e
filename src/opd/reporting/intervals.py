"""Confidence intervals for the two numbers an evaluation reports, a share of right answers and a mean, and for their differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

NORMAL_FROM_DEGREES = 1000  # Student's t is within 0.2 % of the normal quantile from here on (95 % level)


def wilson_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a binomial proportion; stays inside [0, 1] and keeps its coverage at 0 and n successes.

        (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n),  p = successes / n

    Wilson (1927), JASA 22:209; recommended by Brown, Cai and DasGupta (2001). (0, 1) when n = 0.
    """
    _check_level(level)
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie between 0 and n = {n}, not {successes}.")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    p = successes / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # The end points at p = 0 and p = 1 are exact; rounding would leave 1e−17 there.
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == n else (centre + spread) / scale
    return low, high


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean of independent values: mean ± t_{n−1} · s/√n.

    Student (1908), Biometrika 6:1. (−∞, ∞) for fewer than two values, which have no spread.
    """
    _check_level(level)
    n = len(values)
    if n < 2:
        return -math.inf, math.inf
    half_width = student_t_quantile((1 + level) / 2, n - 1) * stdev(values) / math.sqrt(n)
    mean = fmean(values)
    return mean - half_width, mean + half_width


def paired_share_interval(gained: int, lost: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of the difference of two shares over the same n cases, of which `gained` turned right and `lost` turned wrong.

    Agresti and Min (2005), Statistics in Medicine 24:729: Wald's interval after half a case was added to each of the four
    cells, so that n agreeing cases do not claim certainty.

        (b − c)/N ± z √(b + c − (b − c)²/N) / N,  b = gained + ½, c = lost + ½, N = n + 2
    """
    _check_level(level)
    if min(gained, lost) < 0 or gained + lost > n:
        raise ValueError(
            f"gained and lost must not be negative, nor more than n = {n} together; not {gained} and {lost}."
        )
    b, c, total = gained + 0.5, lost + 0.5, n + 2
    half_width = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(b + c - (b - c) ** 2 / total) / total
    centre = (b - c) / total
    return max(-1.0, centre - half_width), min(1.0, centre + half_width)


def unpaired_interval(
    base: tuple[float, tuple[float, float]], other: tuple[float, tuple[float, float]]
) -> tuple[float, float]:
    """Interval of `other` − `base`, two independent estimates, each (value, interval).

        d − √((x₂ − l₂)² + (u₁ − x₁)²),  d + √((u₂ − x₂)² + (x₁ − l₁)²)

    Newcombe (1998), Statistics in Medicine 17:873, method 10; for other estimates Zou and Donner (2008), ibid. 27:1693.
    """
    (x1, (l1, u1)), (x2, (l2, u2)) = base, other
    return x2 - x1 - math.hypot(x2 - l2, u1 - x1), x2 - x1 + math.hypot(u2 - x2, x1 - l1)


def welch_interval(base: Sequence[float], other: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Welch's interval of mean(other) − mean(base) of independent values, at least two on each side.

    Welch (1947), Biometrika 34:28; the degrees of freedom are rounded down, which widens it.
    """
    _check_level(level)
    if min(len(base), len(other)) < 2:
        return -math.inf, math.inf
    errors = [stdev(values) ** 2 / len(values) for values in (base, other)]
    total, distance = sum(errors), fmean(other) - fmean(base)
    if total == 0:
        return distance, distance
    degrees = total**2 / sum(e**2 / (len(v) - 1) for e, v in zip(errors, (base, other), strict=True))
    half_width = student_t_quantile((1 + level) / 2, max(1, math.floor(degrees))) * math.sqrt(total)
    return distance - half_width, distance + half_width


def student_t_quantile(probability: float, degrees: int) -> float:
    """The t with P(T ≤ t) = probability ≥ 1/2, by bisection; the normal quantile from 1000 degrees on."""
    normal = NormalDist().inv_cdf(probability)
    if degrees >= NORMAL_FROM_DEGREES:
        return normal
    central = 2 * probability - 1
    low, high = normal, max(1.0, 2 * normal)
    while _central_probability(high, degrees) < central:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if _central_probability(middle, degrees) < central:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _central_probability(t: float, degrees: int) -> float:
    """P(|T| ≤ t), as the finite sum of Abramowitz and Stegun, 26.7.3 (odd degrees) and 26.7.4 (even degrees)."""
    angle = math.atan(t / math.sqrt(degrees))
    cos2 = math.cos(angle) ** 2
    odd = degrees % 2 == 1
    term = math.cos(angle) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cos2 * (k - 1) / k
        total += term
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, not {level}.")

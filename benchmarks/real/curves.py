"""Accuracy by update from the rewards of training: every prompt is new to the model that answers it."""

from __future__ import annotations

from collections.abc import Sequence


def rising(values: Sequence[float]) -> list[float]:
    """The isotonic regression: the non-decreasing series that is nearest in squares (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            (a, m), (b, n) = pools[-2], pools[-1]
            pools[-2:] = [((a * m + b * n) / (m + n), m + n)]
    return [value for value, count in pools for _ in range(count)]


def updates_to(rewards: Sequence[float], level: float) -> float | None:
    """Updates until the rising curve is at `level`, between the middles of its steps by straight lines; None where it never is.

    `rewards[i]` is the mean reward of the weights after i updates."""
    fitted = rising(rewards)
    if not fitted or fitted[-1] < level:
        return None
    middles: list[tuple[float, float]] = []
    start = 0
    for end in range(1, len(fitted) + 1):
        if end == len(fitted) or fitted[end] != fitted[start]:
            middles.append(((start + end - 1) / 2, fitted[start]))
            start = end
    before = None
    for place, value in middles:
        if value >= level:
            if before is None:
                return 0.0
            left, low = before
            return left + (place - left) * (level - low) / (value - low)
        before = place, value
    return None

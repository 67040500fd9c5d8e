"""Numbers about whole responses, by pencil."""

from __future__ import annotations

import pytest

from opd.trainer.metrics import repetition


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ((1, 2, 3, 4, 5, 6), 0.0),  # three 4-grams, all different
        ((1, 1, 1, 1, 1, 1), 2 / 3),  # three, one of a kind
        ((1, 2, 3, 1, 2, 3, 1), 1 / 4),  # 1231 2312 3123 1231
        ((1, 2, 3), 0.0),  # too short to repeat anything
    ],
)
def test_repetition_is_the_share_of_4_grams_seen_before(ids, expected):
    assert repetition(ids) == pytest.approx(expected)

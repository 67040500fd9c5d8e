"""Time series of metrics, collected from the records, thinned, smoothed and rounded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from opd.reporting.record import MetricsRecord, Who
from opd.reporting.summary import Interval

MAX_POINTS = 800  # per curve; more are averaged, so that a long run's page stays small
SMOOTH_SHARE = 25  # the moving average spans 1/25 of the run
SIGNIFICANT_DIGITS = 6
LOG_FROM_RATIO = 30  # largest over smallest value


@dataclass(frozen=True, kw_only=True)
class Series:
    """One metric over the run; `intervals` runs along `values` where the metric has them."""

    steps: Sequence[float]
    values: Sequence[float]
    intervals: Sequence[Interval | None]


class Curves:
    """The metrics of a run, by name. Where a step was recorded twice, the later record counts."""

    def __init__(self, records: Iterable[MetricsRecord]) -> None:
        points: dict[tuple[Who | None, str], dict[int, tuple[float, Interval | None]]] = {}
        for record in records:
            for name, value in record.metrics.items():
                points.setdefault((record.who, name), {})[record.step] = (value, record.intervals.get(name))
        self._series = {key: _series(by_step) for key, by_step in points.items()}
        steps = [step for by_step in points.values() for step in by_step]
        self.first: int = min(steps, default=0)
        self.last: int = max(steps, default=0)

    def get(self, who: Who | None, metric: str) -> Series | None:
        return self._series.get((who, metric))

    def names(self, who: Who | None) -> list[str]:
        return [name for owner, name in self._series if owner == who]

    def last_value(self, who: Who | None, metric: str) -> float | None:
        series = self.get(who, metric)
        return next((v for v in reversed(series.values) if math.isfinite(v)), None) if series else None


def _series(by_step: Mapping[int, tuple[float, Interval | None]]) -> Series:
    steps = sorted(by_step)
    return Series(
        steps=steps, values=[by_step[step][0] for step in steps], intervals=[by_step[step][1] for step in steps]
    )


def thinned(series: Series) -> Series:
    """At most `MAX_POINTS` points, each the mean of its neighbours."""
    size = math.ceil(len(series.steps) / MAX_POINTS)
    if size <= 1:
        return series
    starts = range(0, len(series.steps), size)
    return Series(
        steps=[series.steps[start] for start in starts],
        values=[mean(series.values[start : start + size]) for start in starts],
        intervals=[series.intervals[start] for start in starts],
    )


def smoothed(values: Sequence[float]) -> list[float]:
    """Centred moving average, narrower at the ends."""
    half = max(1, len(values) // SMOOTH_SHARE // 2)
    result = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        result.append(mean(values[index - reach : index + reach + 1]))
    return result


def mean(values: Sequence[float]) -> float:
    """Mean of the finite values; NaN without any."""
    finite = _finite(values)
    return sum(finite) / len(finite) if finite else math.nan


def rounded(values: Iterable[float]) -> list[float | None]:
    return [float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None for value in values]


def spans_decades(values: Sequence[float]) -> bool:
    """True for values that are positive and spread widely enough for a logarithmic axis."""
    finite = _finite(values)
    return bool(finite) and min(finite) > 0 and max(finite) / min(finite) >= LOG_FROM_RATIO


def decades(values: Sequence[float]) -> float:
    """log10 of the largest over the smallest finite value."""
    finite = _finite(values)
    return math.log10(max(finite) / min(finite))


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]

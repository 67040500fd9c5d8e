"""Time series of metrics, collected from the records, thinned and rounded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from opd.reporting.record import MetricsRecord, Who
from opd.reporting.summary import Interval

MAX_POINTS = 500  # per curve; more are put into bins, so that a long run's page stays small
SIGNIFICANT_DIGITS = 6
EXTREME_DIGITS = 4
LOG_FROM_RATIO = 30  # largest over smallest value


@dataclass(frozen=True, kw_only=True)
class Series:
    """One metric over the run; `intervals` runs along `values` where the metric has them."""

    steps: Sequence[float]
    values: Sequence[float]
    intervals: Sequence[Interval | None]
    extremes: Sequence[Interval] | None = None
    """(smallest, largest) value of each bin, where `values` are means of bins."""


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


def thinned(series: Series, limit: int = MAX_POINTS) -> Series:
    """At most `limit` points. Above, each is the mean of a bin of neighbours, at the first step of the bin; the smallest and the
    largest value of each bin are kept, so that a spike of one step stays visible at its height."""
    size = math.ceil(len(series.steps) / limit)
    if size <= 1:
        return series
    bins = [slice(start, start + size) for start in range(0, len(series.steps), size)]
    return Series(
        steps=[series.steps[part.start] for part in bins],
        values=[mean(series.values[part]) for part in bins],
        intervals=[_widest(series.intervals[part]) for part in bins],
        extremes=[_extremes(series.values[part]) for part in bins],
    )


def _extremes(values: Sequence[float]) -> Interval:
    finite = _finite(values)
    return (min(finite), max(finite)) if finite else (math.nan, math.nan)


def _widest(intervals: Sequence[Interval | None]) -> Interval | None:
    known = [interval for interval in intervals if interval is not None]
    return (min(low for low, _ in known), max(high for _, high in known)) if known else None


def mean(values: Sequence[float]) -> float:
    """Mean of the finite values; NaN without any."""
    finite = _finite(values)
    return sum(finite) / len(finite) if finite else math.nan


def rounded(values: Iterable[float], digits: int = SIGNIFICANT_DIGITS) -> list[float | None]:
    """Values as JSON takes them: None for what is not finite."""
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values]


def spans_decades(values: Sequence[float]) -> bool:
    """True for values that are positive and spread widely enough for a logarithmic axis."""
    finite = _finite(values)
    return bool(finite) and min(finite) > 0 and max(finite) / min(finite) >= LOG_FROM_RATIO


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]

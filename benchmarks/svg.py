"""Style and axes of the SVG figures."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1f2328}.t{font-weight:600;font-size:13px}.s{fill:#59636e;font-size:11px}"
    "line{stroke:#d1d9e0}.a{stroke:#818b98}svg{background:#fff}"
)


@dataclass(frozen=True)
class Axis:
    """Logarithmic, from `low` to `high`, onto the pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        part = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        return [m * 10**d for d in decades for m in (1, 2, 5) if self.low <= m * 10**d <= self.high]


def points(places: Iterable[tuple[float, float]]) -> str:
    """Of a polyline or polygon."""
    return " ".join(f"{px:.1f},{py:.1f}" for px, py in places)

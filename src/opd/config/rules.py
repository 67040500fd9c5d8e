"""Rules about numbers that several sections share. Each raises ConfigError, with the recipe's keys."""

from __future__ import annotations

import math

from opd.config.sections import Section
from opd.errors import require


def at_least(low: int, section: Section, *names: str) -> None:
    """Refuse values below `low`; None passes."""
    for name in names:
        value = getattr(section, name)
        require(value is None or value >= low, f"{section.place}{name} must be at least {low}, not {value}")


def not_negative(section: Section, *names: str) -> None:
    """Refuse negative and infinite values; None passes."""
    for name in names:
        value = getattr(section, name)
        ok = value is None or (math.isfinite(value) and value >= 0)
        require(ok, f"{section.place}{name} must be 0 or a positive number, not {value}")


def positive(section: Section, *names: str, unless: str = "") -> None:
    """Refuse 0, negative and infinite values; None passes, and `unless` says what it means."""
    for name in names:
        value = getattr(section, name)
        ok = value is None or (math.isfinite(value) and value > 0)
        require(ok, f"{section.place}{name} must be a positive number{unless}, not {value}")

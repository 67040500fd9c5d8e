"""`Config`: the settings of a whole run, with an objective that computes. Torch comes with it."""

from __future__ import annotations

from dataclasses import field
from typing import Any, TypeVar

from opd.config.run import RunSettings
from opd.losses import Objective

T = TypeVar("T")


class Config(RunSettings):
    """A whole run."""

    objective: Objective = field(default_factory=Objective)


def whole_config(settings: RunSettings) -> Config:
    """The run that checked settings describe. No rule is asked again, and no warning given twice."""
    values = dict(vars(settings))
    if not isinstance(settings.objective, Objective):
        values["objective"] = _with_values(Objective, vars(settings.objective))
    return _with_values(Config, values)


def _with_values(kind: type[T], values: dict[str, Any]) -> T:
    """A frozen dataclass of values that were checked before."""
    made = object.__new__(kind)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made

"""The teacher backend of each `opd.placement`."""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

from opd.integrations.verl.plugin.settings import Settings
from opd.integrations.verl.plugin.teachers.base import TeacherBackend
from opd.integrations.verl.plugin.teachers.in_actor import InActorTeachers
from opd.integrations.verl.plugin.teachers.served_hidden_states import ServedHiddenStates
from opd.integrations.verl.plugin.teachers.served_logprobs import ServedLogProbs


def make_backend(settings: Settings, engine: Any) -> TeacherBackend:
    """The backend for verl's engine of the student. Loads weights in `actor` and an output layer in `hidden`."""
    if settings.placement == "pool":
        return ServedLogProbs(settings, engine)
    if settings.placement == "hidden":
        return ServedHiddenStates(settings, engine)
    return InActorTeachers(settings, engine)

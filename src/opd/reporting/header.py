"""The words at the head of a report: models, objective, data, machine, versions, and how far the run is."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from opd.reporting.about import About, State

Mood = Literal["going", "good", "bad"]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How far a run is, in words."""

    text: str
    mood: Mood


@dataclass(frozen=True, kw_only=True)
class Header:
    """The head of a page."""

    student: str = ""
    teacher: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    """(name, value) pairs, such as ("data", "train.jsonl, 4,096 prompts")."""
    command: str = ""
    standing: Standing | None = None


def header(about: About | None, state: State | None, config: Mapping[str, Any]) -> Header:
    """From about.json and state.json; of runs that lack them, models and data from the configuration."""
    about = about or from_config(config)
    versions = ", ".join(f"{name} {version}" for name, version in about.versions.items())
    facts = {
        "objective": about.objective,
        "data": about.data,
        "device": about.device,
        "hardware": about.hardware,
        "started": moment(about.started),
        "versions": versions,
        "commit": _commit(about.commit),
    }
    return Header(
        student=about.student,
        teacher=about.teacher,
        facts=tuple((name, value) for name, value in facts.items() if value),
        command=about.command,
        standing=None if state is None else standing(state),
    )


def standing(state: State) -> Standing:
    """One line, such as "running, step 5 of 30" or "stopped after step 12 of 20: the reward collapsed"."""
    of = f"step {state.step:,} of {state.steps:,}" if state.steps else f"step {state.step:,}"
    why = f": {state.why}" if state.why else ""
    if not state.alive:
        return Standing(text=f"ended without a word after {of}", mood="bad")
    if state.name == "failed":
        return Standing(text=f"failed at {of}{why}", mood="bad")
    if state.name == "stopped":
        return Standing(text=f"stopped after {of}{why}", mood="bad")
    if state.name == "finished":
        steps = f"{state.step:,} step{'' if state.step == 1 else 's'}"
        return Standing(text=f"finished, {steps}{why}", mood="good")
    at = f" (at {moment(state.updated)})" if state.updated else ""
    return Standing(text=("loading" if state.name == "loading" else f"running, {of}") + at, mood="going")


def moment(when: str | float) -> str:
    """ISO 8601 or seconds since 1970 as "27 Nov 2026, 13:51 UTC"; text that is no date stays as it is."""
    try:
        if isinstance(when, str):
            at = datetime.datetime.fromisoformat(when.replace("Z", "+00:00"))
        else:
            at = datetime.datetime.fromtimestamp(when, datetime.timezone.utc)
    except (ValueError, OverflowError, OSError):
        return str(when)
    zone = at.strftime("%Z") or ""
    return f"{at.day} {at:%b %Y, %H:%M} {zone}".strip()


def spelled(seconds: float) -> str:
    """A duration with its units: "43 s", "1 min 10 s", "2 h 5 min"."""
    if not math.isfinite(seconds):
        return "—"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minute} min"
    return f"{minute} min {second} s" if minute else f"{second} s"


def _commit(commit: str) -> str:
    changed = " with changes that are not committed" if commit.endswith("+") else ""
    return commit.removesuffix("+")[:12] + changed


def from_config(config: Mapping[str, Any]) -> About:
    """What the configuration alone says of a run."""

    def text(section: str, *keys: str) -> str:
        values = config.get(section)
        found = (values.get(key) for key in keys) if isinstance(values, Mapping) else ()
        return next((value for value in found if isinstance(value, str) and value), "")

    teachers = config.get("teachers")
    several = " + ".join(map(str, teachers)) if isinstance(teachers, Mapping) else ""
    return About(
        student=text("student", "model"),
        teacher=several or text("teacher", "model"),
        objective=text("objective", "divergence").replace("_", " ").replace(" kl", " KL"),
        data=text("prompts", "path"),
    )

"""`guard.json`: when rules of the section guard were broken in a run, as its report shows it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from opd.reporting.files import GUARD_FILE, explain_os_errors, strict_json, write_atomically

GuardAction = Literal["warn", "drop", "stop"]


@dataclass(frozen=True, kw_only=True)
class Onset:
    """A rule whose patience is over."""

    step: int
    """Number of the update, from 0."""
    rule: str
    """Such as "repetition"."""
    action: GuardAction
    value: float
    """What the rule compares with its threshold."""
    facts: str
    """The number, and what it is compared with."""
    advice: str
    """Likely causes with the key that changes each."""

    @property
    def text(self) -> str:
        """One or two sentences, with the rule's key."""
        return f"guard.{self.rule}: {self.facts} {self.advice}"


def write_onsets(run_dir: str | Path, onsets: Sequence[Onset]) -> None:
    """Replace guard.json. Raises RunFolderError where the folder cannot be written."""
    text = json.dumps(strict_json({"onsets": [asdict(one) for one in onsets]}), indent=2, ensure_ascii=False)
    write_atomically(Path(run_dir) / GUARD_FILE, (text + "\n").encode("utf-8", "backslashreplace"))


def read_onsets(run_dir: str | Path) -> list[Onset]:
    """In the order in which they came; none of a run that broke no rule, and where the file is no record of one."""
    path = Path(run_dir) / GUARD_FILE
    with explain_os_errors("read", path):
        if not path.exists():
            return []
        raw = path.read_bytes()
    try:
        return [Onset(**one) for one in json.loads(raw)["onsets"]]
    except (ValueError, TypeError, KeyError):
        return []


def onset_notes(onsets: Sequence[Onset]) -> list[str]:
    """A sentence or two about each."""
    return [f"Step {one.step}: {one.text}" for one in onsets]

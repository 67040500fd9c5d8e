"""What one check of a recipe says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["green", "yellow", "red"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check says: green is right, yellow may not be what is meant, red would be refused or would fail."""

    level: Level
    check: str
    text: str

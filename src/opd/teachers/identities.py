"""Names for served models, whose weights nobody sees: a folder remembers what each said to a fixed text."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from opd.durable import replacing
from opd.errors import CacheError

FILE = "served.json"
LOCK_SECONDS = 60.0
SAME = 1e-3  # mean nats: one server repeats itself to 1e-5 in float32; a model that was trained on is further away


class Identities:
    """The served models that a folder of kept scores knows. A model that answers otherwise than before is another one, so that none
    of its predecessor's scores is read for it; at worst, rounding makes one model two, and its scores are asked for again."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def name_of(self, about: str, said: str) -> str:
        """The name of the model behind `about` (its API and its name) that gives these log-probs, numbers in text, to the fixed text.
        Where nothing can be written it is not remembered, and the run goes on. Raises CacheError for a damaged file."""
        with suppress(OSError, NotImplementedError), FileLock(f"{self.path}.lock", timeout=LOCK_SECONDS):
            if (name := self._known(about, said)) is None:
                name = _new_name(about, said)
                with replacing(self.path) as file:
                    file.write(
                        json.dumps([*self._read(), {"name": name, "about": about, "said": said}], indent=1).encode()
                    )
            return name
        return self._known(about, said) or _new_name(about, said)

    def _known(self, about: str, said: str) -> str | None:
        same = (one for one in self._read() if one["about"] == about and _apart(one["said"], said) <= SAME)
        return next((one["name"] for one in same), None)

    def _read(self) -> list[dict[str, str]]:
        try:
            found: Any = json.loads(self.path.read_text(encoding="utf-8"))
            return [{key: str(one[key]) for key in ("name", "about", "said")} for one in found]
        except OSError:
            return []
        except (ValueError, TypeError, KeyError):
            raise CacheError(
                f"'{self.path}' is damaged: it names the served models whose scores are kept. Delete it: the scores of served teachers are "
                "asked for again then, and those of teachers in this process stay."
            ) from None


def _new_name(about: str, said: str) -> str:
    return hashlib.sha256(json.dumps([about, said]).encode()).hexdigest()


def _apart(one: str, other: str) -> float:
    """Mean distance in nats; infinite for texts of different lengths."""
    a, b = ([float(value) for value in text.split()] for text in (one, other))
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a) if a and len(a) == len(b) else float("inf")

"""Keys of servers: read from the environment, sent in a header, shown nowhere."""

from __future__ import annotations

import os
import re

from opd.errors import ConfigError

NAME = re.compile(r"[A-Z_][A-Z0-9_]*")
"""Of an environment variable. Lower case is refused, because a key may look like that and must not stand in a recipe."""
SENDABLE = re.compile(r"[\x21-\x7e]+")


class ApiKey:
    """A key whose value no text shows."""

    def __init__(self, variable: str, value: str) -> None:
        self.variable = variable
        self._value = value

    def __repr__(self) -> str:
        return f"ApiKey(${self.variable})"

    def __reduce__(self) -> str:
        raise TypeError("an API key is not written to a file")

    @property
    def headers(self) -> dict[str, str]:
        """What a request carries."""
        return {"Authorization": f"Bearer {self._value}"}

    def hidden(self, text: str) -> str:
        """The text without the key: servers like to repeat a key that they refuse."""
        return text.replace(self._value, f"(${self.variable})")


def check_variable(name: str, key: str) -> None:
    """Raise ConfigError for what cannot be the name of an environment variable; it may be the key itself, and is not shown."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{key} is the name of an environment variable that holds the key, in capitals, such as TEACHER_API_KEY; what stands there is "
            "none. A key itself does not belong into a recipe, which is copied into every run folder."
        )


def read_key(name: str | None, key: str) -> ApiKey | None:
    """The key in the environment variable `name`; None asks for none. Raises ConfigError where it is not set or cannot be sent."""
    if name is None:
        return None
    check_variable(name, key)
    value = os.environ.get(name, "").strip()
    if not value:
        raise ConfigError(
            f"{key}={name}, and that environment variable is not set or empty; set it (export {name}=…), or drop the key."
        )
    if not SENDABLE.fullmatch(value):
        raise ConfigError(
            f"The environment variable {name} ({key}) holds a space, a line break or a letter outside ASCII, so it is no key; set it again."
        )
    return ApiKey(name, value)

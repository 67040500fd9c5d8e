"""The address of a server, as a recipe gives it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from opd.errors import ConfigError

SCHEMES = ("http", "https")
CHAT_CANNOT_SCORE = (
    "A chat API cannot score given tokens: it answers with tokens of its own. Serve the teacher with vLLM or SGLang, which say what the "
    "model gives to every token of a prompt."
)


@dataclass(frozen=True)
class Address:
    """A server's root. It holds nothing secret, so messages may show it."""

    url: str
    """Without a slash at its end, and without the /v1 that clients of OpenAI's API put there."""
    host: str
    encrypted: bool

    def __str__(self) -> str:
        return self.url

    @property
    def loopback(self) -> bool:
        """The server runs on this machine, and nobody else hears what is sent to it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost" or self.host.endswith(".localhost")


def parse_address(url: str, key: str) -> Address:
    """Read an address; `key` names where it stands. Raises ConfigError, which never shows what may be a secret."""
    if any(mark in url for mark in "@?#"):
        raise ConfigError(
            f"{key} holds more than an address (a name, a password or a key), and a recipe is copied into every run folder. Write "
            f"http://HOST:PORT alone, put the key into an environment variable, and name it in {key.rpartition('.')[0]}.api_key_env."
        )
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ConfigError(f"{key} is no address that can be read; write it as http://HOST:PORT.") from None
    if parts.scheme not in SCHEMES or not host:
        raise ConfigError(
            f"{key}='{url}' is no address of a server; write e.g. http://127.0.0.1:8000 (http://HOST:PORT)."
        )
    path = parts.path.rstrip("/")
    path = path.removesuffix("/v1").rstrip("/")
    shown = f"[{host}]" if ":" in host else host
    root = f"{parts.scheme}://{shown}{'' if port is None else f':{port}'}{path}"
    return Address(root, host, parts.scheme == "https")


def parse_addresses(urls: str | list[str] | tuple[str, ...], key: str) -> list[Address]:
    """The addresses of a pool. Raises ConfigError for none, and for one that stands there twice."""
    found = [parse_address(url, key) for url in ([urls] if isinstance(urls, str) else urls)]
    if not found:
        raise ConfigError(f"{key} is empty; write http://HOST:PORT, or drop it.")
    twice = sorted({str(one) for one in found if found.count(one) > 1})
    if twice:
        raise ConfigError(f"{key} names {', '.join(twice)} more than once; a server is asked in parallel as it is.")
    return found


def warnings_of(addresses: list[Address], key: str, *, keyed: bool) -> list[str]:
    """A warning for each host elsewhere that is spoken to without encryption."""
    sent = "Prompts, responses and the key" if keyed else "Prompts and responses"
    return [
        f"{key}={one}: {sent} travel to {one.host} unencrypted, and anybody on the way can read and change them. Use https, or an SSH "
        "tunnel to a port of this machine."
        for one in addresses
        if not one.encrypted and not one.loopback
    ]

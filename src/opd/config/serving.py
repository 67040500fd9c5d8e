"""Settings of `opd serve-teacher`."""

from __future__ import annotations

import ipaddress
from dataclasses import field

from opd.config.model import DType, LoadOptionsConfig
from opd.config.rules import at_least, positive
from opd.config.sections import Section
from opd.errors import require

DEFAULT_TOKEN_ENV = "OPD_SERVE_TOKEN"


class ServeConfig(Section):
    """A frozen model behind HTTP, for students on other machines."""

    model: str
    """Local folder or hub name of a causal language model."""
    revision: str | None = None
    """Hub revision."""
    dtype: DType = "auto"
    """'auto' is bfloat16 on CUDA and float32 on CPU."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', 'cuda:1'."""
    attn_implementation: str | None = None
    """'sdpa', 'eager', 'flash_attention_2'; None leaves it to transformers."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    load_options: LoadOptionsConfig = field(default_factory=LoadOptionsConfig)
    """Quantise it as it is loaded, as in a recipe."""
    host: str = "127.0.0.1"
    """Address to listen at. Any that other machines can reach needs a token."""
    port: int = 8790
    """0 takes a free one and prints it."""
    token_env: str | None = None
    """Name of the environment variable that holds the token; OPD_SERVE_TOKEN is read where it is set."""
    max_tokens: int = 16384
    """Tokens of one forward pass, padding included; the longest row that is read."""
    max_request_rows: int = 1024
    """Rows of one request."""
    max_request_tokens: int = 131072
    """Tokens of one request."""
    max_body_mb: int = 64
    """Size of one request."""
    max_queue_tokens: int = 1048576
    """Tokens of all requests that wait, are read, or whose answers are on their way; more are told to come back (429)."""
    timeout: float = 120.0
    """Seconds that a client may take to send a request, and to take its answer."""

    def __post_init__(self) -> None:
        at_least(1, self, "max_tokens", "max_request_rows", "max_request_tokens", "max_body_mb", "max_queue_tokens")
        positive(self, "timeout")
        require(0 <= self.port < 1 << 16, f"port={self.port} is none: use 1 to 65535, or 0 for a free one.")

    @property
    def is_local(self) -> bool:
        """Only programs of this machine can reach the host."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """True for localhost and its addresses."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"

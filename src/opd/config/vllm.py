"""Section of vLLM as the engine of rollouts."""

from __future__ import annotations

from typing import Literal

from opd.config.rules import positive
from opd.config.sections import Section
from opd.errors import require
from opd.remote.address import parse_address
from opd.remote.keys import check_variable

MAX_VLLM_TEMPERATURE = 2.0  # vLLM's own limit (400 "temperature must be in [0, 2]")
VllmMode = Literal["managed", "server", "colocate"]
READ_IN: dict[str, tuple[VllmMode, ...]] = {
    "url": ("server",),
    "api_key_env": ("server",),
    "python": ("managed",),
    "args": ("managed",),
    "memory_share": ("managed", "colocate"),
    "max_model_len": ("managed", "colocate"),
    "sync_dir": ("managed", "server"),
    "start_timeout": ("managed",),
    "timeout": ("managed", "server"),
}
"""Modes that read each key."""
OPD_SETS = ("--model", "--host", "--port", "--served-model-name", "--logprobs-mode", "--generation-config")
"""Arguments of the server that opd itself gives."""


class VllmConfig(Section, key="rollout.vllm"):
    """vLLM as the engine of the student's samples, in training and in evaluations. Read with rollout.engine=vllm."""

    mode: VllmMode | None = None
    """managed: opd starts a server on this machine and stops it; server: the one at `url`; colocate: vLLM in this process. Unset, it is
    server where `url` is set, and managed elsewhere."""
    url: str | None = None
    """Address of a server that is there already, e.g. http://127.0.0.1:8000; it serves one run at a time."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the server's key. The key itself belongs in no recipe."""
    python: str | None = None
    """managed: the Python interpreter that has vLLM; unset, the one that runs opd."""
    args: tuple[str, ...] = ()
    """managed: further arguments of the server, e.g. [--tensor-parallel-size, '2']."""
    memory_share: float = 0.3
    """Share of the device's memory that vLLM takes, its weights included; about 0.3 beside training, 0.9 on a device of its own."""
    max_model_len: int | None = None
    """Longest prompt and response together, in tokens; unset, what the run's prompts need."""
    sync_dir: str | None = None
    """Folder through which every update's weights go, in memory if it can be; the server has to see it. Unset, a folder in /dev/shm or
    the system's place for temporary files."""
    start_timeout: float = 600.0
    """Seconds that a managed server may take to start."""
    timeout: float = 600.0
    """Seconds that the server may take for a response, or for new weights."""
    max_gap: float = 0.2
    """Nats by which the log-probs of sampler and trainer may differ, in the mean over a step's tokens; beyond it the run stops.
    Measured at rollout.temperature=1 without top_p and top_k. bfloat16 costs 0.01 to 0.05."""

    def __post_init__(self) -> None:
        if self.mode is None:
            self._fill_in(mode="managed" if self.url is None else "server")
        self._check_secrets()
        changed = {name for name in READ_IN if getattr(self, name) != type(self).__dataclass_fields__[name].default}
        for name in sorted(changed):
            require(
                self.mode in READ_IN[name],
                f"rollout.vllm.{name} is read with rollout.vllm.mode={' or '.join(READ_IN[name])}, and the mode is {self.mode}; drop it, or "
                "change the mode.",
            )
        require(
            self.mode != "server" or self.url is not None,
            "rollout.vllm.mode=server needs the server's address; set rollout.vllm.url, e.g. http://127.0.0.1:8000, or use mode=managed.",
        )
        self._check_numbers()
        taken = [word for word in self.args if word.split("=")[0].replace("_", "-") in OPD_SETS]
        require(
            not taken,
            f"rollout.vllm.args holds {taken[0] if taken else ''}, which opd sets itself; drop it. A server of your own goes by "
            "rollout.vllm.url.",
        )

    def _check_numbers(self) -> None:
        positive(self, "start_timeout", "timeout", "max_gap")
        require(0 < self.memory_share <= 1, f"rollout.vllm.memory_share must be in (0, 1], not {self.memory_share}")
        require(
            self.max_model_len is None or self.max_model_len >= 2,
            f"rollout.vllm.max_model_len must hold a prompt and a response, so 2 at least, not {self.max_model_len}",
        )

    def _check_secrets(self) -> None:
        """Refuse keys in the recipe, and addresses that are none. No message repeats what may be a key."""
        if self.api_key_env is not None:
            check_variable(self.api_key_env, "rollout.vllm.api_key_env")
        require(
            not any(word.split("=")[0] == "--api-key" for word in self.args),
            "rollout.vllm.args holds --api-key, and a key in a recipe is written into config.yaml. A managed server listens on this machine "
            "alone and needs none; drop it.",
        )
        if self.url is not None:
            parse_address(self.url, "rollout.vllm.url")

    @property
    def plain_text_abroad(self) -> bool:
        """Prompts, responses and the key leave this machine unencrypted."""
        if self.url is None:
            return False
        address = parse_address(self.url, "rollout.vllm.url")
        return not (address.encrypted or address.loopback)

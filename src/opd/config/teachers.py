"""Sections of the teachers, and of how several make one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, fields
from typing import ClassVar, Literal

from opd.config.loss_rules import check_names, check_weights
from opd.config.model import DType, ModelConfig
from opd.config.rules import at_least, positive
from opd.config.sections import Section
from opd.errors import ObjectiveError, require
from opd.losses.settings import ObjectiveSettings
from opd.losses.weights import linear_schedule
from opd.remote.address import CHAT_CANNOT_SCORE, parse_addresses
from opd.remote.keys import check_variable

ServerApi = Literal["vllm", "sglang", "openai", "opd"]
ASKED = ("served_model", "api_key_env", "concurrency", "timeout", "deadline", "api")
"""Keys that say how a server is asked."""
LOADED = ("device", "dtype", "attn_implementation", "offload")
"""Keys that say how a model is loaded into this process."""


class TeacherConfig(ModelConfig, key="teacher"):
    """The frozen model that scores the student's samples, in this process or behind a server. It has the student's vocabulary."""

    model: str = ""
    """Local folder or hub name of a causal language model; not read where `source` is the student itself. Beside `url` it is where the
    teacher's tokenizer and chat template are, and empty takes the student's."""
    url: tuple[str, ...] = ()
    """Address of an inference server that holds the teacher, e.g. http://127.0.0.1:8000; several are a pool of one and the same model."""
    api: ServerApi = "vllm"
    """How the server is asked: vllm (prompt_logprobs), sglang (/generate), openai (completions with echo and logprobs), or opd (opd
    serve-teacher: hidden states, so that every divergence stays exact; it sends its tokenizer too)."""
    served_model: str | None = None
    """The model's name at the server; None takes the one that is there."""
    api_key_env: str | None = None
    """Environment variable that holds the server's key. The key itself is written down nowhere."""
    concurrency: int = 32
    """Requests under way at once, all servers together."""
    timeout: float = 120.0
    """Seconds that one answer may take."""
    deadline: float = 600.0
    """Seconds after which rollouts that no server could score, tried again and again, stop the run."""
    canary_every: int = 10
    """Steps between looks whether it still gives a fixed text the log-probs of the start (guard.canary); 0 looks at the start alone."""
    source: Literal["model", "adapter_off", "ema", "student"] = "model"
    """Self-distillation: the student without its adapter, the moving average of its weights, or the student as it is at every step,
    each of them best with prompts.teacher_prompt, which shows the teacher more than the student sees."""
    ema_decay: float = 0.99
    """source=ema: average ← ema_decay · average + (1 − ema_decay) · student after every step."""
    dtype: DType = "auto"
    """'auto' is bfloat16 on CUDA and float32 on CPU. With api: opd, the dtype in which hidden states travel: auto is bfloat16."""
    tokens_per_batch: int = 16384
    """Tokens the teacher reads at once (padding included); of a server, in one request."""
    supply: Literal["auto", "hidden", "dense", "top_k", "sampled"] = "auto"
    """Kind of target for the loss; 'auto' is the most exact kind that the objective can use."""
    offload: bool = False
    """Keep it in CPU memory while it is not asked (its output layer stays on the device): slower, and room for more teachers."""
    cache: str | None = None
    """Folder in which its scores are kept by content: a response that was scored before, in this run or another, costs no forward
    pass. Runs and teachers may share one."""

    def __post_init__(self) -> None:
        at_least(1, self, "tokens_per_batch", "concurrency")
        at_least(0, self, "canary_every")
        positive(self, "timeout", "deadline")
        require(
            bool(self.model or self.url) or self.source != "model",
            "'teacher.model' is not set, and has no default. Add it to the recipe or pass --teacher.model VALUE; teacher.url is a teacher "
            "behind a server, and teacher.source=ema, adapter_off or student teaches the student by itself.",
        )
        require(
            not self.model.startswith(("http://", "https://")),
            "teacher.model is a folder or hub name, and the address of a server is teacher.url; write it there.",
        )
        self._check_server()
        require(
            not self.model or self.source == "model",
            f"teacher.source={self.source} takes the student's own weights, so teacher.model='{self.model}' is not read; drop one.",
        )
        require(0 <= self.ema_decay < 1, f"teacher.ema_decay must lie in [0, 1), not {self.ema_decay}")
        require(
            self.source == "model" or not self.offload,
            f"teacher.offload=true would take the student itself off its device with teacher.source={self.source}; drop it.",
        )
        require(
            self.cache is None or bool(self.cache.strip()),
            "teacher.cache is empty; name a folder for the kept scores, or drop it.",
        )
        require(
            self.cache is None or self.source in ("model", "adapter_off"),
            f"teacher.cache='{self.cache}' keeps scores for later, and with teacher.source={self.source} the teacher's weights move with "
            "every step, so that none would ever be read again; drop it.",
        )

    @property
    def sends_log_probs(self) -> bool:
        """It is behind a server that sends log-probs of some tokens, and no whole distribution."""
        return bool(self.url) and self.api != "opd"

    def check_objective(self, objective: ObjectiveSettings, place: str) -> None:
        """Raise ObjectiveError where the server cannot send what the objective needs."""
        if not self.sends_log_probs or {"top_k", "sampled"} & set(objective.needs):
            return
        needed = {
            "full": "every vocabulary entry",
            "student_top_k": "tokens that the student chooses",
            "union": "tokens that the student chooses",
        }.get(objective.support, "more than the server's likeliest tokens")
        if objective.teacher_temperature != 1:
            needed = f"logits, to divide them by objective.teacher_temperature={objective.teacher_temperature:g}"
        elif objective.support == "teacher_top_k":
            needed = f"the tokens of objective.always_include={objective.always_include}"
        raise ObjectiveError(
            f"objective.support={objective.support} needs {needed}, and {place}.url (api={self.api}) sends the teacher's likeliest tokens "
            "and the sampled one, at temperature 1. Use objective.support=teacher_top_k with objective.tail=sampled, which is unbiased at "
            "every top_k and costs nothing here (arXiv 2609.34447), objective.support=sampled, or a teacher in this process "
            f"({place}.model)."
        )

    def _check_server(self) -> None:
        """The keys of a server, and those that a server does not read."""
        require(
            not self.url or not self.load_options,
            "teacher.load_options is about a model in this process, and teacher.url's is loaded by its server; give it to opd serve-teacher "
            "(--load-options.quantization), and drop it here.",
        )
        default = {item.name: item.default for item in fields(self)}
        changed = [name for name in (*ASKED, *LOADED) if getattr(self, name) != default[name]]
        if not self.url:
            idle = [name for name in changed if name in ASKED]
            require(
                not idle,
                f"teacher.{idle and idle[0]} is about a server, and there is none; set teacher.url, or drop it.",
            )
            return
        require(
            self.source == "model",
            f"teacher.source={self.source} takes the student's own weights, and teacher.url asks a server for another model's; drop one.",
        )
        require(
            not any("/chat/completions" in url for url in self.url),
            f"teacher.url: {CHAT_CANNOT_SCORE} Give the server's root address.",
        )
        parse_addresses(self.url, "teacher.url")
        if self.api_key_env is not None:
            check_variable(self.api_key_env, "teacher.api_key_env")
        if self.api == "opd":
            self._check_exact_server(changed)
            return
        idle = [name for name in changed if name in LOADED]
        require(
            not idle,
            f"teacher.{idle and idle[0]} is about a model in this process, and teacher.url's is loaded by its server; set it there, and "
            "drop it here.",
        )
        require(
            self.model != "" or (self.revision is None and not self.trust_remote_code),
            "teacher.revision and teacher.trust_remote_code are about teacher.model, which names the tokenizer beside teacher.url and is "
            "not set; set it, or drop them.",
        )
        require(
            self.supply not in ("hidden", "dense"),
            f"teacher.supply={self.supply} is more than a server with api={self.api} sends: it is asked for top_k or sampled. Drop it; "
            "exact divergences need a teacher in this process, or one behind opd serve-teacher (teacher.api=opd).",
        )

    def _check_exact_server(self, changed: Sequence[str]) -> None:
        """The keys that `opd serve-teacher` and its client do not read."""
        idle = [name for name in changed if name in ("served_model", "attn_implementation", "offload")]
        require(
            not idle,
            f"teacher.{idle and idle[0]} is not read with teacher.api=opd: opd serve-teacher holds one model, loads it itself, and names it "
            "in every answer. Drop it.",
        )
        require(
            self.dtype != "float16",
            "teacher.dtype=float16 is no dtype in which hidden states travel, because large ones overflow in it; use bfloat16 or float32.",
        )


class BaseMixtureConfig(Section, key="mixture"):
    """The kind of a mixture of teachers and its weights. Shared by the recipe and verl's `opd.mixture`."""

    kind: Literal["routing", "probability", "logit", "loss"] = "routing"
    """routing: every prompt has one teacher, which its column prompts.teacher_column names; probability: Σ w q; logit: softmax of
    Σ w log q; loss: Σ w D(S, T), a loss for each."""
    weights: dict[str, float] = field(default_factory=dict[str, float])
    """Weight of every teacher by name, 1 in sum; empty is the same for all. With routing, read by balance_tokens."""

    def __post_init__(self) -> None:
        if self.weights:
            check_weights("mixture.weights", self.weights)
            require(self.reads_weights, f"mixture.weights {self._idle}")

    @property
    def reads_weights(self) -> bool:
        """The weights of the teachers matter."""
        return self.kind != "routing"

    _idle: ClassVar[str] = (
        "would change nothing: with mixture.kind=routing a prompt has one teacher. Use another kind, or drop it."
    )

    def check_names(self, names: Sequence[str]) -> None:
        """Raise ConfigError for weights of teachers that are not there, or teachers without one."""
        check_names("mixture.weights", self.weights, names)

    def at(self, step: int, total_steps: int, names: Sequence[str]) -> dict[str, float]:
        """The weights of this step."""
        return {name: self.weights[name] if self.weights else 1.0 / len(names) for name in names}


class MixtureConfig(BaseMixtureConfig, key="mixture"):
    """Mixture of several teachers (section teachers). Read where there are two or more."""

    weights_end: dict[str, float] = field(default_factory=dict[str, float])
    """The weights move to these, linearly; empty keeps them."""
    schedule_steps: int | None = None
    """Steps that the move takes; None is the whole run."""
    weights_column: str | None = None
    """Column of the prompts with weights of their own, e.g. {"math": 0.7, "code": 0.3}; a prompt without takes mixture.weights."""
    balance_tokens: bool = False
    """routing: the tokens of every teacher's prompts count as mixture.weights say in sum, however many or long the responses are."""

    _idle = (
        "would change nothing: with mixture.kind=routing a prompt has one teacher. Set balance_tokens=true to weigh the teachers' tokens, "
        "or another kind."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights_end:
            check_weights("mixture.weights_end", self.weights_end)
        at_least(1, self, "schedule_steps")
        require(
            self.schedule_steps is None or bool(self.weights_end),
            f"mixture.schedule_steps={self.schedule_steps} is how long the weights move, and they do not; set mixture.weights_end, or drop it.",
        )
        require(
            not self.balance_tokens or self.kind == "routing",
            f"mixture.balance_tokens is about prompts that have a teacher each, and mixture.kind={self.kind} asks all teachers about "
            "all prompts; use kind=routing, or mixture.weights.",
        )
        require(self.reads_weights or not self.weights_end, f"mixture.weights_end {self._idle}")
        require(
            self.weights_column is None or self.kind != "routing",
            "mixture.weights_column gives a prompt several teachers, and mixture.kind=routing gives it one; use kind=probability, logit "
            "or loss.",
        )

    @property
    def reads_weights(self) -> bool:
        """The weights of the teachers matter."""
        return self.kind != "routing" or self.balance_tokens

    def check_names(self, names: Sequence[str]) -> None:
        """Raise ConfigError for weights of teachers that are not there, or teachers without one."""
        super().check_names(names)
        check_names("mixture.weights_end", self.weights_end, names)

    def at(self, step: int, total_steps: int, names: Sequence[str]) -> dict[str, float]:
        """The weights of this step."""
        start = super().at(step, total_steps, names)
        if not self.weights_end:
            return start
        steps = self.schedule_steps or max(1, total_steps - 1)
        return {name: linear_schedule(start[name], self.weights_end[name], steps).at(step) for name in names}

"""Section of the prompts."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from opd.config.rules import at_least
from opd.config.sections import Section
from opd.errors import require

TASK_PREFIX = "reasoning_gym:"


class ReasoningGymConfig(Section, key="prompts.reasoning_gym"):
    """Tasks of reasoning-gym (extra 'reasoning-gym'), for path: reasoning_gym:NAME with eval.reward: reasoning_gym. Row i is made from
    seed + i, so seeds that are close make the same rows."""

    size: int = 1000
    """Rows to train on; eval.prompts says how many are held out."""
    seed: int = 0
    """Of the first row to train on."""
    eval_seed: int = 1_000_000_000
    """Of the first held-out row."""
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    """Settings of the task, e.g. min_terms: 2; its page in reasoning-gym's gallery lists them."""
    chat: bool = True
    """A question is a message of the user; false makes it plain text, for a model without a chat template."""

    def __post_init__(self) -> None:
        at_least(1, self, "size")
        at_least(0, self, "seed", "eval_seed")
        taken = [name for name in ("size", "seed") if name in self.config]
        require(
            not taken,
            f"prompts.reasoning_gym.config has {' and '.join(taken)}; set prompts.reasoning_gym.{taken and taken[0]} in its place.",
        )

    def task(self, *, held_out: int | None) -> dict[str, Any]:
        """What `load_prompts` takes: of the rows to train on, or of that many held-out ones."""
        size, seed = (self.size, self.seed) if held_out is None else (held_out, self.eval_seed)
        return {"size": size, "seed": seed, "config": self.config, "chat": self.chat}


class PromptsConfig(Section, key="prompts"):
    """Files and columns of the prompts."""

    path: str
    """JSONL, JSON or parquet file, a dataset folder, 'hub:owner/name', or 'reasoning_gym:NAME' for a task of that package."""
    eval_path: str | None = None
    """Held-out prompts, in the same form."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    eval_split: str = "test"
    """Split of a Hugging Face dataset for eval_path."""
    prompt_column: str = "prompt"
    """Text, or a list of chat messages; without such a column, messages or conversations (ShareGPT), whose own column system is their
    system message. a.b names a field inside a column, here and below. The columns tools, documents and
    chat_template_kwargs go to the chat template with the messages, as JSON text where the order of keys or a null matters: parquet
    and datasets keep neither."""
    answer_column: str = "answer"
    """Reference answer for the reward (optional); without such a column, reward_model.ground_truth (verl)."""
    response_column: str = "response"
    """Reference response for off-policy distillation (optional); without it, completion (TRL), or the last message of the assistant."""
    teacher_column: str = "teacher"
    """Name of the teacher of each prompt (optional)."""
    system: str | None = None
    """System message put before chat prompts that have none."""
    teacher_prompt: str | None = None
    """Jinja template of what the teacher reads in place of the prompt; may use any column, e.g. "{{ prompt }} (answer: {{ answer }})"."""
    user_message: str | None = None
    """Jinja template of the user's message, over any column, e.g. "{{ question }} Put the final number in \\boxed{}."; every prompt is
    then a chat with this one message, and prompt_column is not read."""
    shuffle: bool = True
    """A new order every epoch, from the seed."""
    limit: int | None = None
    """Use only the first rows."""
    reasoning_gym: ReasoningGymConfig = field(default_factory=ReasoningGymConfig)
    """Settings of path: reasoning_gym:NAME."""

    def __post_init__(self) -> None:
        require(
            self.user_message is None or self.prompt_column == "prompt",
            f"prompts.user_message writes the prompt, so that prompts.prompt_column='{self.prompt_column}' is not read; drop one.",
        )
        task = any((path or "").startswith(TASK_PREFIX) for path in (self.path, self.eval_path))
        require(
            task or self.reasoning_gym == ReasoningGymConfig(),
            f"prompts.reasoning_gym has settings of a task, and prompts.path={self.path} is none; set prompts.path={TASK_PREFIX}NAME, or "
            "drop the section.",
        )

    def check_held_out(self, prompts: int) -> None:
        """Raise ConfigError where a task's held-out rows, of which there are `prompts`, are among those to train on."""
        task, path = self.reasoning_gym, self.eval_path
        if path is None or path != self.path or not path.startswith(TASK_PREFIX):
            return
        apart = task.eval_seed >= task.seed + task.size or task.eval_seed + prompts <= task.seed
        require(
            apart,
            f"prompts.reasoning_gym.eval_seed={task.eval_seed} makes held-out rows that are trained on: row i comes from seed + i, and the "
            f"{task.size} rows to train on take the seeds from {task.seed}. Set eval_seed to {task.seed + task.size} or more.",
        )

    @property
    def templates(self) -> str:
        """The words that may name a column by which a prompt is written."""
        return f"{self.teacher_prompt} {self.user_message} {self.prompt_column}"

    def training(self) -> dict[str, Any]:
        """What `load_prompts` takes of the rows to train on."""
        task = self.reasoning_gym.task(held_out=None)
        return {"split": self.split, "limit": self.limit, "task": task, **self.columns}

    def held_out(self, prompts: int) -> dict[str, Any]:
        """What `load_prompts` takes of `prompts` held-out rows."""
        task = self.reasoning_gym.task(held_out=prompts)
        return {"split": self.eval_split, "limit": prompts, "task": task, **self.columns}

    @property
    def columns(self) -> dict[str, str | None]:
        """The names of the columns, as `load_prompts` takes them."""
        return {
            "prompt_column": self.prompt_column,
            "answer_column": self.answer_column,
            "response_column": self.response_column,
            "teacher_column": self.teacher_column,
            "user_message": self.user_message,
        }

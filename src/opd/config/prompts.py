"""Section of the prompts."""

from __future__ import annotations

from opd.config.sections import Section


class PromptsConfig(Section, key="prompts"):
    """Files and columns of the prompts."""

    path: str
    """JSONL, JSON or parquet file, a dataset folder, or 'hub:owner/name'."""
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
    shuffle: bool = True
    """A new order every epoch, from the seed."""
    limit: int | None = None
    """Use only the first rows."""

    @property
    def columns(self) -> dict[str, str]:
        """The names of the columns, as `load_prompts` takes them."""
        return {
            "prompt_column": self.prompt_column,
            "answer_column": self.answer_column,
            "response_column": self.response_column,
            "teacher_column": self.teacher_column,
        }

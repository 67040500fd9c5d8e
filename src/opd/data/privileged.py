"""A teacher's own wording of every prompt: a template that may use any field of the row, such as the reference answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from opd.data.messages import content_text
from opd.data.rendering import Renderer
from opd.data.row_template import RowTemplate
from opd.errors import DataError
from opd.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PrivilegedRenderer(Renderer):
    """Rewrites a prompt before it is rendered: its text, or the last message of the user."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        *,
        name: str,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        system: str | None = None,
    ) -> None:
        """`template` is Jinja. It sees `prompt` (the text that it replaces), `answer`, `response`, `teacher`, and every other
        column of the row by its name. Raises ConfigError for a template with a syntax error."""
        super().__init__(tokenizer, name=name, chat_template_kwargs=chat_template_kwargs, system=system)
        self._template = RowTemplate(template, key="prompts.teacher_prompt", example="answer")
        self._rewritten: dict[int, tuple[Prompt, Prompt]] = {}

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of the rewritten prompt. Raises DataError for a row that lacks a field of the template."""
        kept = self._rewritten.get(id(prompt))  # held-out prompts have the same indices
        if kept is None:
            kept = self._rewritten[id(prompt)] = (prompt, self.rewritten(prompt))
        return super().prompt_ids(kept[1])

    def rewritten(self, prompt: Prompt) -> Prompt:
        """The prompt as the teacher gets it."""
        if prompt.messages is None:
            return replace(prompt, text=self._filled(prompt, prompt.text or ""))
        messages = [dict(message) for message in prompt.messages]
        asked = next((message for message in reversed(messages) if message.get("role") == "user"), None)
        if asked is None:
            raise DataError(
                f"prompt {prompt.index} has no message of the user, whose place prompts.teacher_prompt would take; remove the row."
            )
        asked["content"] = self._filled(prompt, content_text(asked.get("content")))
        return replace(prompt, messages=tuple(messages))

    def _filled(self, prompt: Prompt, text: str) -> str:
        own = {"answer": prompt.answer, "response": prompt.response, "teacher": prompt.teacher}
        return self._template.filled({**prompt.metadata, **own, "prompt": text}, f"prompt {prompt.index}")

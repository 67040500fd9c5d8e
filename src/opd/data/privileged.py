"""A teacher's own wording of every prompt: a template that may use any field of the row, such as the reference answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from opd.data.messages import content_text
from opd.data.rendering import Renderer
from opd.data.values import plain
from opd.errors import ConfigError, DataError
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
        from jinja2 import StrictUndefined, TemplateSyntaxError
        from jinja2.sandbox import SandboxedEnvironment

        super().__init__(tokenizer, name=name, chat_template_kwargs=chat_template_kwargs, system=system)
        environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        try:
            self._template = environment.from_string(template)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"prompts.teacher_prompt is not a Jinja template: {error}. Write fields of the row as {{{{ answer }}}}."
            ) from error
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
        fields = plain({**prompt.metadata, **own})
        try:
            return self._template.render({**fields, "prompt": text})
        except Exception as error:  # somebody else's template: anything that Python can raise
            raise DataError(
                f"prompts.teacher_prompt cannot be filled in for prompt {prompt.index}: {error}. The row has "
                f"{', '.join(sorted({*fields, 'prompt'}))}; add the field to every row, or guard it with {{% if … is defined %}}."
            ) from error

"""Each model's way of writing prompts, as its section of the recipe says. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opd.config.model import ModelConfig
from opd.config.prompts import PromptsConfig
from opd.data.privileged import PrivilegedRenderer
from opd.data.rendering import Renderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_renderer(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, name: str, prompts: PromptsConfig, *, rewrites: bool
) -> Renderer:
    """This model's way of writing prompts; `rewrites` lets it follow prompts.teacher_prompt."""
    options: dict[str, Any] = {
        "name": name,
        "chat_template_kwargs": config.chat_template_kwargs,
        "system": prompts.system,
    }
    template = prompts.teacher_prompt if rewrites else None
    return Renderer(tokenizer, **options) if template is None else PrivilegedRenderer(tokenizer, template, **options)

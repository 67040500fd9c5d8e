"""From files to `Prompt`s, from prompts to token ids, from rollouts and targets to a `Batch`.

`pack` shares its name with its module, so it is imported from there: `from opd.data.pack import pack`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd.data.prompts import PromptSchedule, load_prompts
    from opd.data.rendering import Renderer, eos_ids

__all__ = ["PromptSchedule", "Renderer", "eos_ids", "load_prompts"]

_HOMES = {
    "PromptSchedule": "opd.data.prompts",
    "Renderer": "opd.data.rendering",
    "eos_ids": "opd.data.rendering",
    "load_prompts": "opd.data.prompts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

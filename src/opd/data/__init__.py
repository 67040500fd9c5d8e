"""Prompts of a file, prompts as token ids, and rollouts with targets as micro-batches.

`pack` has the name of its module: `from opd.data.pack import pack`.
"""

from __future__ import annotations

from opd.data.prompts import PromptSchedule, load_prompts
from opd.data.rendering import Renderer, eos_ids

__all__ = ["PromptSchedule", "Renderer", "eos_ids", "load_prompts"]

"""verl's FSDP settings with the section `opd` beside them, as `OpdEngine` reads them."""

# pyright: reportMissingImports=false
from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
import transformers
import verl
from verl.workers.config import FSDPEngineConfig

from opd.integrations.verl.plugin.settings import Settings, parse


@dataclass
class OpdEngineConfig(FSDPEngineConfig):
    """The section actor.fsdp_config. verl makes one in every worker, before it looks for an engine."""

    opd: Any = None
    """The `opd:` section as written."""
    opd_reduction: dict[str, Any] = field(default_factory=dict)
    """loss_agg_mode and loss_scale_factor of the actor."""

    def settings(self) -> Settings:
        return parse(self.opd or {})[0]


def start_line(settings: Settings) -> str:
    """Versions and the resolved objective: the sign that the plugin is in, because verl hides one that failed to load."""
    release: str = verl.__version__  # pyright: ignore[reportAttributeAccessIssue]
    versions = f"verl {release}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"opd {version('opd')} ({versions}): {settings.describe()}"

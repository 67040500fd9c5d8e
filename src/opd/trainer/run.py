"""`train(config)`: a recipe from beginning to end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd.config import Config
from opd.trainer.distiller import Distiller
from opd.trainer.launch import Launch


def train(
    config: Config | Mapping[str, Any],
    *,
    resume: bool = False,
    overwrite: bool = False,
    launch: Launch | None = None,
) -> dict[str, Any] | None:
    """Run a recipe, a Config or the dict that would make one, and return its summary (None without evaluation).

    As `Distiller.from_config(config).train(…)`, which says what it leaves and raises.
    """
    return Distiller.from_config(config, launch=launch).train(resume=resume, overwrite=overwrite).summary

"""Where the demo's recipe is. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from opd.errors import ConfigError


def recipe_path() -> Path:
    """Path of the demo's recipe, in an installed package or in the checkout."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "recipes", package.parents[1] / "recipes"):
        if (candidate / "demo" / "recipe.yaml").exists():
            return candidate / "demo" / "recipe.yaml"
    raise ConfigError("The demo's recipe is missing from this installation; reinstall opd.")

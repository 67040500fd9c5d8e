"""Overrides that come after the user's own, and the rows of the table that explains them."""

# pyright: reportMissingImports=false
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from opd.integrations.verl.dry_run.compose import literal

ACTOR, ROLLOUT, REF, MODEL = (f"actor_rollout_ref.{name}" for name in ("actor", "rollout", "ref", "model"))


@dataclass
class ConfigOverrides:
    """Changes to a user's config."""

    config: DictConfig
    values: dict[str, Any] = field(default_factory=dict)
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    """(setting, in the user's config, here)."""

    def has(self, key: str) -> bool:
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(self.config, parent) if parent else self.config
        return isinstance(node, DictConfig) and name in node

    def get(self, key: str) -> Any:
        """The user's value; None for a key that is not there."""
        return OmegaConf.select(self.config, key, throw_on_missing=False)

    def set(self, key: str, value: Any) -> None:
        self.values[key] = value

    def row(self, setting: str, own: Any, here: Any) -> None:
        self.rows.append((setting, str(own), str(here)))

    def overrides(self) -> list[str]:
        """In Hydra's form, without those that the user's config has anyway."""
        return [f"++{key}={literal(value)}" for key, value in self.values.items() if not self._is_so(key, value)]

    def _is_so(self, key: str, value: Any) -> bool:
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(self.config, parent)
        if not self.has(key) or OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name):
            return False
        return self.get(key) == value and type(self.get(key)) is type(value)


def has_critic(config: DictConfig) -> bool:
    enabled = config.critic.enable
    return bool(enabled) if enabled is not None else config.algorithm.adv_estimator == "gae"

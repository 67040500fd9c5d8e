"""Puts the config group `opd` on Hydra's search path, so that `+opd=default` works with any Hydra application, verl's included."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath  # pyright: ignore[reportMissingImports]
from hydra.plugins.search_path_plugin import SearchPathPlugin  # pyright: ignore[reportMissingImports]


class OpdSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="opd", path="pkg://opd.integrations.verl.plugin.conf")

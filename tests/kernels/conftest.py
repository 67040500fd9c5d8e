"""The full product of kernel cases runs only when it is asked for: `pytest -m product tests/kernels`."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "product" in config.getoption("-m", default=""):
        return
    left_out = [item for item in items if item.get_closest_marker("product") is not None]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.get_closest_marker("product") is None]

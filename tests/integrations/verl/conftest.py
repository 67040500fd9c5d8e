"""Tests of the verl plugin: in an environment that has verl; elsewhere the folder is skipped, but for what needs no verl."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

os.environ["VERL_PLATFORM"] = "cpu"  # before the first import of verl, which settles its device for good

NEEDS_NO_VERL = ("test_settings.py", "test_checks.py", "test_sampling.py", "test_step_guard.py")
collect_ignore = (
    []
    if importlib.util.find_spec("verl")
    else [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name not in NEEDS_NO_VERL]
)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from verl_world import make_models

    return make_models(tmp_path_factory.mktemp("models"))

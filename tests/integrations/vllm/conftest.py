"""Tests with a real vLLM: in an environment that has it (`make vllm`); elsewhere the folder is skipped."""

from __future__ import annotations

import importlib.util
import os
import uuid
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ["OPD_TEST_MARK"] = uuid.uuid4().hex  # in the environment of everything that this process starts

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vllm_world import make_world

    return make_world(tmp_path_factory.mktemp("world"))

"""Shared by all tests: quiet transformers, a fixed number of threads, and small real models."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from worlds import make_world

transformers_logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny models: a second thread costs more than it does, and results stay the same everywhere


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))

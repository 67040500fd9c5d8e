"""Shared by all tests: quiet transformers, one thread, two processes for folders, and small real models."""

from __future__ import annotations

import fcntl
import os
import signal
import tempfile
from collections.abc import Generator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers.utils import logging as transformers_logging

from worlds import make_world

for _number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
    # As a shell leaves them to a command. `nohup`, and a script's job in the background, have some ignored, which a run respects.
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)

PROCESSES = 2
"""Processes for a run of folders: the cores of the smallest machine that runs everything."""
ON_REQUEST = ("product", "endurance", "browser")
"""Marks of tests that run only where `-m` names them, or their folder is named."""
LOCKS = pytest.StashKey[tempfile.TemporaryDirectory]()

transformers_logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny models: a second thread costs more than it does, and results stay the same everywhere


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Folders run in PROCESSES processes, file by file; named files in one, which starts sooner. `-n` overrides."""
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    options = config.option
    watched = options.usepdb or options.capture == "no" or getattr(options, "cov_source", None)  # --pdb, -s, --cov
    if options.numprocesses is None and not watched:
        options.numprocesses = PROCESSES if all(Path(argument).is_dir() for argument in config.args) else 0
    if options.numprocesses and options.dist == "no":
        options.dist, options.loadscopereorder = "loadfile", False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What has a mark of ON_REQUEST is left out unless `-m` asks for it. Files with slow tests come first, so that no process waits long
    for the other at the end."""
    asked = [config.getoption("-m", default=""), *(part for argument in config.args for part in Path(argument).parts)]
    unasked = [mark for mark in ON_REQUEST if not any(mark in words for words in asked)]
    for item in items:
        if (
            "browser" in item.path.parts
        ):  # playwright's event loop takes the place of a test's own: such tests have a process to themselves
            item.add_marker("browser")
    left_out = [item for item in items if any(item.get_closest_marker(mark) for mark in unasked)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        out = set(left_out)
        items[:] = [item for item in items if item not in out]
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """The folder of the locks, for each of the processes."""
    stash = node.config.stash
    if LOCKS not in stash:
        stash[LOCKS] = tempfile.TemporaryDirectory(prefix="opd-tests-")
    node.workerinput["locks"] = stash[LOCKS].name


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A `serial` test runs alone: the other processes wait until it has ended."""
    folder = getattr(item.config, "workerinput", {}).get("locks")
    if folder is None:
        return (yield)
    kind = fcntl.LOCK_EX if item.get_closest_marker("serial") else fcntl.LOCK_SH
    with Path(folder, "running").open("w") as running:
        with Path(folder, "next").open("w") as following:  # held while waiting, so that nobody overtakes a serial test
            fcntl.flock(following, fcntl.LOCK_EX)
            fcntl.flock(running, kind)
            fcntl.flock(following, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(running, fcntl.LOCK_UN)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))

"""The plugin is in: in a fresh process, and told apart from not being in."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from opd.integrations.verl.doctor import run

LIGHT = """
import sys, time
import torch
import verl
before = set(sys.modules)
import opd.integrations.verl.plugin
print(sorted(m for m in set(sys.modules) - before if not m.startswith("opd")))
print([m for m in sys.modules if m.startswith("opd")])
"""


def test_the_doctor_finds_everything_in_place(capfd: pytest.CaptureFixture[str]):
    assert run() == 0
    out = capfd.readouterr().out
    assert "FAIL" not in out and "`import verl` loads the plugin" in out


def test_the_doctor_tells_when_verl_was_told_to_load_no_plugins(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    assert run() == 1
    assert "FAIL  `import verl` did not load the plugin" in capfd.readouterr().out


def test_on_a_gpu_machine_the_plugin_imports_nothing_of_its_own():
    env = {**os.environ, "VERL_PLATFORM": "nvidia"}
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    new, ours = done.stdout.splitlines()[-2:]
    assert new == "[]"
    assert ours == "['opd', 'opd.integrations', 'opd.integrations.verl', 'opd.integrations.verl.plugin']"

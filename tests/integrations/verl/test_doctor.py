"""`opd doctor verl` where verl is installed."""

from __future__ import annotations

import os
import subprocess
import sys


def doctor(**env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "opd.cli.main", "doctor", "verl"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **env})


def test_the_command_finds_the_plugin_in_place():
    done = doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(line.startswith("ok  ") for line in done.stdout.splitlines())
    assert "+opd=default is a config group of verl.trainer.main_ppo" in done.stdout


def test_the_command_fails_where_verl_loads_no_plugins():
    done = doctor(VERL_USE_EXTERNAL_PLUGINS="none")
    assert done.returncode == 1
    assert "FAIL  `import verl` did not load the plugin" in done.stdout
    assert "Traceback" not in done.stderr

"""The example from Python is twelve lines that run as they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "from_python.py"


def test_it_is_at_most_twelve_lines_beside_docstring_and_blank_lines():
    _, lines = EXAMPLE.read_text(encoding="utf-8").split("\n", 1)
    assert len([line for line in lines.splitlines() if line.strip() and line.strip() != ")  # fmt: skip"]) <= 12


def test_it_runs_as_it_is_and_lowers_the_reverse_kl(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=tmp_path,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr
    kl = [float(number) for number in re.findall(r"^step \d+: KL ([\d.]+)$", done.stdout, re.MULTILINE)]
    assert kl[-1] < 0.9 * kl[0]
    assert (tmp_path / "runs/from_python/report.html").exists()

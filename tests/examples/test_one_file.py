"""The example teaches: it is short, stands on its own, and does what it says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "one_file.py"
ALLOWED = {"torch", "transformers", "opd.losses", *sys.stdlib_module_names}
MAX_LINES = 250
KL = re.compile(r"reverse KL ([\d.]+)")


def imported_modules() -> set[str]:
    tree = ast.parse(EXAMPLE.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


def test_the_example_fits_on_a_few_screens():
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_the_example_needs_only_torch_transformers_and_the_losses():
    strangers = {m for m in imported_modules() if m not in ALLOWED and m.split(".")[0] not in ALLOWED}
    assert not strangers
    assert "opd.losses" in imported_modules()


@pytest.mark.timeout(300)
def test_a_short_run_lowers_the_reverse_kl():
    options = ["--steps", "12", "--fit-steps", "20", "--batch", "64"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *options], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    kl = [float(value) for value in KL.findall(done.stdout)]
    assert len(kl) >= 3
    assert kl[-1] < 0.9 * kl[0]
    assert {"teacher", "student before", "student after"} <= {
        line.split("accuracy")[0].strip() for line in done.stdout.splitlines()
    }

"""Measurements that the documentation quotes. `python -m benchmarks NAME`."""

from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
RESULTS = FOLDER / "results"

"""TRL's environment: how it is made, how a module runs in it, and the arguments of its trainers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import FOLDER, ROOT

TRL_ENVIRONMENT = FOLDER / ".venv-trl"
CONSTRAINTS = FOLDER / "constraints-trl.txt"

ON_CPU: Mapping[str, Any] = {
    "weight_decay": 0.0,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
"""Arguments of TRL's trainers that switch off work its defaults would add."""


def trl_python() -> str:
    """The interpreter of TRL's environment, which is made on first use."""
    python = TRL_ENVIRONMENT / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", TRL_ENVIRONMENT], check=True)
        subprocess.run([python, "-m", "pip", "install", "-r", CONSTRAINTS], check=True)
    return str(python)


def run_module(python: str, module: str, folder: Path, argument: str, *, threads: int, **variables: str) -> Any:
    """Runs the module in a process of its own, whose environment `variables` join; returns the JSON it writes to the path that is its last
    argument."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        **variables,
    }
    done = subprocess.run(
        [python, "-m", module, argument, str(result)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode or not result.exists():
        raise SystemExit(f"{module} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(result.read_text())


def versions() -> dict[str, str]:
    """Versions of the packages that decide a time or a curve."""
    import torch
    import transformers
    import trl  # pyright: ignore[reportMissingImports]

    return {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}

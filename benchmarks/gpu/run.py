"""`opd demo` on the device, as a user starts it: it learns, a killed run goes on, one seed gives one run, bfloat16 weights cost little."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.sheet import CheckFailed, Sheet
from opd.reporting.record import read_metrics
from opd.trainer.checkpoint import checkpoints

STEPS, CHECKPOINT = 40, 10
REHEARSED = ("--train.prompts_per_step", "8", "--eval.prompts", "8", "--eval.extra_temperatures", "[]")
INPUTS = ("base", "teacher", "train.jsonl", "eval.jsonl")
CLOCKS = "time/"
"""Metrics under this name are seconds, and differ between any two runs."""
ROWS = ("student_before", "student_after", "teacher")
TIMEOUT = 150.0
NAMED = re.compile(r"([\w:]+) does not have a deterministic implementation")
DETERMINISTIC = """
import sys, torch
torch.use_deterministic_algorithms(True, warn_only=True)
from opd.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@dataclass(kw_only=True)
class Demo:
    """Folder of the runs, and the first run, with which the others are compared."""

    sheet: Sheet
    folder: Path

    @property
    def first(self) -> Path:
        return self.folder / "first"

    @property
    def steps(self) -> int:
        return 20 if self.sheet.rehearse else STEPS

    @property
    def checkpoint(self) -> int:
        return 1 if self.sheet.rehearse else CHECKPOINT

    def words(self, run: Path, *more: str) -> list[str]:
        device = str(self.sheet.device)
        fixed = ["--run_dir", str(run), "--train.steps", str(self.steps), "--checkpoint.every", str(self.checkpoint)]
        fixed += ["--eval.every", str(self.steps), "--student.device", device, "--log.progress", "plain"]
        return ["demo", *fixed, *(REHEARSED if self.sheet.rehearse else ()), *more]

    def start(self, words: Sequence[str], code: Sequence[str] = ("-m", "opd.cli.main")) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *code, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
        )

    def finish(self, process: subprocess.Popen[str]) -> str:
        """Standard output of the command. Raises CheckFailed when it fails or exceeds its time."""
        try:
            said, _ = process.communicate(timeout=max(5.0, min(TIMEOUT, self.sheet.left)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise CheckFailed("did not end in time") from None
        if process.returncode:
            raise CheckFailed(f"exit code {process.returncode}: {' '.join(said.split())[-300:]}")
        return said

    def fresh(self, name: str, source: Path | None = None) -> Path:
        """A run folder with another run's models and prompts; by default, the first run's."""
        run = self.folder / name
        run.mkdir()
        for part in INPUTS:
            given = (source or self.first) / part
            (shutil.copytree if given.is_dir() else shutil.copy)(given, run / part)
        return run


def measure(sheet: Sheet) -> None:
    with tempfile.TemporaryDirectory(prefix="opd-demo-") as folder:
        demo = Demo(sheet=sheet, folder=Path(folder))
        if sheet.models is not None:
            demo.fresh(demo.first.name, sheet.models)
        elif sheet.rehearse:
            _untaught_models(demo.first)
        if sheet.case("opd demo", "it learns", partial(_learns, demo), judged=True, seconds=40) is None:
            return
        sheet.case("opd demo", "killed, then --resume", partial(_resumes, demo), judged=True, seconds=25)
        sheet.case("opd demo", "the same seed again", partial(_repeats, demo), judged=True, seconds=25)
        sheet.case("opd demo", "bfloat16 weights", partial(_in_bfloat16, demo), seconds=20)


def _untaught_models(folder: Path) -> None:
    """A rehearsal needs no teacher that knows the answer: fitting one takes longer than all the rest."""
    from opd.testing import digit_tokenizer, save_model, tiny_causal_lm

    for seed, name in enumerate(("teacher", "base")):
        save_model(tiny_causal_lm(digit_tokenizer(), max_positions=64, seed=seed), digit_tokenizer(), folder / name)


def _learns(demo: Demo) -> dict[str, Any]:
    began = time.perf_counter()
    demo.finish(demo.start(demo.words(demo.first)))
    seconds = time.perf_counter() - began
    steps = _metrics(demo.first)
    first, last = steps[0]["reverse_kl"], steps[-1]["reverse_kl"]
    cells = {
        "steps": demo.steps,
        "reverse KL, first step": first,
        "reverse KL, last step": last,
        **_accuracies(demo.first),
        "seconds": seconds,
        "median s per step": sorted(step["time/step"] for step in steps)[len(steps) // 2],
    }
    if len(steps) != demo.steps or not (demo.sheet.rehearse or last < first / 2):
        raise CheckFailed("the reverse KL did not fall to half of what it was", cells)
    return cells


def _resumes(demo: Demo) -> dict[str, Any]:
    """Killed with SIGKILL after its first checkpoint; then the metrics of all steps are those of the run that was not."""
    run = demo.fresh("killed")
    process = demo.start(demo.words(run))
    began = time.monotonic()
    while process.poll() is None and not checkpoints(run / "checkpoints") and time.monotonic() - began < TIMEOUT:
        time.sleep(0.01)
    ended = process.poll() is not None
    process.send_signal(signal.SIGKILL)
    said, _ = process.communicate()
    if ended:
        raise CheckFailed(f"it ended before it could be killed: {' '.join(said.split())[-200:]}")
    reached = len(_metrics(run))
    demo.finish(demo.start(demo.words(run, "--resume")))
    return {"killed after steps": reached, **_compared(_metrics(run), _metrics(demo.first), demo, run)}


def _repeats(demo: Demo) -> dict[str, Any]:
    run = demo.fresh("again")
    demo.finish(demo.start(demo.words(run)))
    return _compared(_metrics(run), _metrics(demo.first), demo, run)


def _compared(mine: list[dict[str, float]], theirs: list[dict[str, float]], demo: Demo, run: Path) -> dict[str, Any]:
    """Equal step by step, or the operators without a deterministic implementation by name."""
    if len(mine) != len(theirs):
        raise CheckFailed(f"{len(mine)} steps were recorded instead of {len(theirs)}")
    for step, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        apart = [name for name in b if not name.startswith(CLOCKS) and a.get(name) != b[name]]
        if apart:
            largest = max(abs(a.get(name, float("nan")) - b[name]) for name in apart)
            cells = {"equal steps": step, "differ": ", ".join(apart[:4]), "by at most": largest}
            cause = _not_deterministic(demo, run.name)
            if not cause:
                raise CheckFailed("the runs differ, and every operator says that it is deterministic", cells)
            return {**cells, "cause": cause}
    return {"equal steps": len(mine)}


def _not_deterministic(demo: Demo, name: str) -> str:
    """PyTorch's warnings when asked for deterministic algorithms."""
    run = demo.fresh(f"{name}-deterministic")
    words = demo.words(run, "--train.steps", "2", "--eval.every", "0")
    said = demo.finish(demo.start(words, ("-W", "always", "-c", DETERMINISTIC)))
    return ", ".join(sorted(set(NAMED.findall(said))))


def _in_bfloat16(demo: Demo) -> dict[str, Any]:
    run = demo.fresh("bfloat16")
    demo.finish(demo.start(demo.words(run, "--student.dtype", "bfloat16")))
    there, here = _metrics(demo.first)[-1], _metrics(run)[-1]
    return {
        "reverse KL, last step": here["reverse_kl"],
        "with float32 weights": there["reverse_kl"],
        **_accuracies(run),
    }


def _metrics(run: Path) -> list[dict[str, float]]:
    """The metrics of every recorded update, in order."""
    return [dict(record.metrics) for record in read_metrics(run) if record.kind == "step"]


def _accuracies(run: Path) -> dict[str, float]:
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return {f"accuracy, {name.replace('_', ' ')}": summary[name]["accuracy"] for name in ROWS}

"""`make gpu`, or `python -m benchmarks gpu`: the parts one after the other, each in its own process with its own time limit.

Every finished case is in `OUT/DEVICE-DATE.json` and `.md` within a second, so that a run that is cut off leaves what it had.
The command runs from a checkout without installation (`PYTHONPATH=src`). `--device cpu --rehearse` runs every part on tiny sizes.
The exit code is 0 when every case ran and every check held; a case that was skipped for a missing package counts as neither.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.parts import PARTS, Part, lacks, missing
from benchmarks.gpu.results import Report, Row, read_rows

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
GRACE = 15.0
"""Seconds that a part has to end by itself after its limit; its cases look at the clock before they begin."""
POLL = 0.5
ABOUT_SECONDS = 120.0
DEVICE_SLUG = 40


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the report")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="default: all parts")
    parser.add_argument(
        "--models", type=Path, help="run folder of `opd demo`: the part `run` takes its models instead of fitting them"
    )
    parser.add_argument("--device", default="cuda", help="'cuda', 'cuda:1', or 'cpu' for a rehearsal")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny sizes: shows that every part runs, measures nothing"
    )
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error("--minutes must be positive.")
    if args.device.startswith("cpu") and not args.rehearse:
        parser.error("the sizes are those of a GPU; on a CPU pass --rehearse as well.")
    command = shlex.join(["python", "-m", "benchmarks", "gpu", *argv])
    chosen = [part for part in PARTS if not args.only or part.name in args.only]
    with tempfile.TemporaryDirectory(prefix="opd-gpu-") as scratch:
        session = Session(
            command=command, args=args, scratch=Path(scratch), deadline=time.monotonic() + 60 * args.minutes
        )
        return session.run(chosen)


@dataclass(kw_only=True)
class Session:
    """One run of the command."""

    command: str
    args: argparse.Namespace
    scratch: Path
    deadline: float
    about: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    stem: str = ""

    def run(self, parts: Sequence[Part]) -> int:
        failed = self._look_around()
        if failed:
            print(failed, file=sys.stderr)
            return 2
        for number, part in enumerate(parts):
            left = max(0.0, self.deadline - time.monotonic())
            self._part(part, left * part.share / sum(later.share for later in parts[number:]))
        self._write("")
        print((self.args.out / f"{self.stem}.md").read_text(encoding="utf-8"))
        print(f"Written: {self.args.out / self.stem}.json and .md")
        wrong = [row for row in self.rows if row.verdict in ("FAIL", "not reached")]
        return 1 if wrong else 0

    def _look_around(self) -> str:
        """Fill `about` and `stem` from a process of its own; a sentence when this machine cannot do it."""
        rows, error = self._process("about", ABOUT_SECONDS)
        found = next((row for row in rows if row.table == "about"), None)
        if found is None:
            return error or "The device could not be looked at."
        if found.verdict == "FAIL":
            return found.note
        self.about = {name: str(value) for name, value in found.cells.items()}
        device = re.sub(r"[^a-z0-9]+", "-", self.about["device"].lower()).strip("-")[:DEVICE_SLUG]
        self.stem = f"{device}-{time.strftime('%Y-%m-%d')}"
        return ""

    def _part(self, part: Part, seconds: float) -> None:
        lacking = missing(part.needs)
        if lacking:
            self.rows.append(Row(part=part.name, table="part", case=part.name, verdict="skipped", note=lacks(lacking)))
            self._write("")
            return
        print(f"{part.name}: {seconds:.0f} s at most", file=sys.stderr, flush=True)
        before = list(self.rows)
        rows, error = self._process(part.name, seconds, before)
        self.rows = before + rows
        if error:
            self.rows.append(Row(part=part.name, table="part", case=part.name, verdict="FAIL", note=error))
        self._write("")

    def _write(self, running: str) -> None:
        Report(command=self.command, about=self.about, rows=self.rows, running=running).write(self.args.out, self.stem)

    def _process(self, name: str, seconds: float, before: Sequence[Row] = ()) -> tuple[list[Row], str]:
        """Run one worker until it ends or its time is over; its rows, and a sentence when it did not end well."""
        rows_path, log_path = self.scratch / f"{name}.jsonl", self.scratch / f"{name}.log"
        words = [sys.executable, "-m", "benchmarks.gpu.worker", name, "--rows", str(rows_path)]
        words += ["--device", self.args.device, "--seconds", f"{seconds:.1f}", *(["--rehearse"] * self.args.rehearse)]
        words += [] if self.args.models is None else ["--models", str(self.args.models.resolve())]
        began, seen = time.monotonic(), 0
        with log_path.open("wb") as log:
            worker = subprocess.Popen(
                words,
                cwd=ROOT,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                while worker.poll() is None and time.monotonic() - began < seconds + GRACE:
                    time.sleep(POLL)
                    size = rows_path.stat().st_size if rows_path.exists() else 0
                    if size != seen and self.stem:
                        seen, self.rows = size, [*before, *read_rows(rows_path)]
                        self._write(name)
            finally:
                cut = _end(worker)
        rows = read_rows(rows_path)
        tail = log_path.read_text(encoding="utf-8", errors="replace")
        self._keep(name, tail)
        if cut:
            return (
                rows,
                f"was ended {GRACE:.0f} s after its limit of {seconds:.0f} s; the cases that it had finished are kept.",
            )
        if worker.returncode:
            sys.stderr.write(tail[-6000:])
            last = next((line for line in reversed(tail.splitlines()) if line.strip()), "no output")
            return rows, f"ended with exit code {worker.returncode}: {last[:300]}"
        return rows, ""

    def _keep(self, name: str, said: str) -> None:
        """What a worker printed, tracebacks of its failed cases among it, in `STEM.log` beside the report."""
        if self.stem:
            with (self.args.out / f"{self.stem}.log").open("a", encoding="utf-8") as log:
                log.write(f"==== {name}\n{said}\n")

    def _environment(self) -> dict[str, str]:
        paths = [str(ROOT / "src"), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        wanted = {
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TRL_EXPERIMENTAL_SILENCE": "1",
        }
        if self.args.device.startswith("cpu"):
            wanted |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        else:  # memory of the largest case is measured beside everything that was cut into other sizes before
            wanted["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        return os.environ | wanted


def _end(worker: subprocess.Popen[bytes]) -> bool:
    """Kills a worker that still runs, with everything that it started; True if it did."""
    if worker.poll() is not None:
        return False
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    return True

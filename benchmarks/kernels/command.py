"""The loss from hidden states, forward and backward, against the bare matrix products and other libraries' own code.

`python -m benchmarks kernels` makes the peers' environment if it is missing, measures every variant in turn, each time in a new
process, and writes benchmarks/results/kernels.csv, kernels.md and kernels.svg. `--quick` runs ours, the products and the plain
loss at toy shapes in this environment. `python -m benchmarks gpu` measures a GPU.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import FOLDER, RESULTS, ROOT
from benchmarks.kernels.cases import (
    COLUMNS,
    QUICK,
    WORKLOADS,
    Row,
    Task,
    Variant,
    Workload,
    row_from_csv,
    variants,
)
from benchmarks.kernels.figure import figure
from benchmarks.kernels.report import report

PEERS_ENVIRONMENT = FOLDER / ".venv-peers"
CONSTRAINTS = Path(__file__).parent / "constraints-peers.txt"
WITHOUT_DEPENDENCIES = ("liger-kernel==0.8.5", "verl==0.9.1")  # what their losses import is in the constraints


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks kernels", description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, help="default: all; A and C with --quick")
    parser.add_argument(
        "--variants", nargs="+", help="names as in the table, for example 'ours' 'TRL GKD'; default: all"
    )
    parser.add_argument("--rounds", type=int, help="processes of each variant, instead of the workload's own number")
    parser.add_argument("--chunk", type=int, help="token chunk of ours, instead of its default")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument(
        "--quick", action="store_true", help="toy shapes, one round, no peers; writes only to --results"
    )
    parser.add_argument(
        "--report", action="store_true", help="measure nothing; write the report of --results' CSV again"
    )
    parser.add_argument("--results", type=Path, help="folder for the CSV, the report and the figure")
    args = parser.parse_args(argv)
    if args.report and args.quick and not args.results:
        parser.error("--quick leaves no CSV; say with --results where one is.")
    names = args.workloads or (["A", "C"] if args.quick else list(WORKLOADS))
    loads = {name: _adapt((QUICK if args.quick else WORKLOADS)[name], args) for name in names}
    results: Path | None = args.results or (None if args.quick else RESULTS)
    command = shlex.join(["python", "-m", "benchmarks", "kernels", *(word for word in argv if word != "--report")])
    with tempfile.TemporaryDirectory() as folder:
        csv_path = (results or Path(folder)) / "kernels.csv"
        csv_path.parent.mkdir(parents=True, exist_ok=True)
        if args.report:
            loads = {name: with_measured_chunk(load, read_rows(csv_path)) for name, load in loads.items()}
        else:
            python = sys.executable if args.quick else peers_python()
            run = Run(python=python, threads=args.threads, folder=Path(folder), csv=csv_path)
            loads = run.measure(loads, only=args.variants, peers=not args.quick)
        rows = read_rows(csv_path)
    text, passed = report(rows, loads, command, toy=args.quick)
    print(text)
    if results is not None:
        (results / "kernels.md").write_text(text)
        (results / "kernels.svg").write_text(figure(rows, loads))
    return 0 if passed else 1


def _adapt(load: Workload, args: argparse.Namespace) -> Workload:
    load = replace(load, rounds=args.rounds or load.rounds)
    return replace(load, chunk=args.chunk) if args.chunk else load


def peers_python() -> str:
    """The interpreter of the peers' environment, which is made on first use."""
    python = PEERS_ENVIRONMENT / "bin" / "python"
    ready = PEERS_ENVIRONMENT / ".ready"
    if not ready.exists() or ready.stat().st_mtime < CONSTRAINTS.stat().st_mtime:
        print(f"Installing PyTorch, TRL, Liger and verl into {PEERS_ENVIRONMENT}: minutes, once.", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", PEERS_ENVIRONMENT], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "-r", CONSTRAINTS], check=True)
        subprocess.run([*install, "--no-deps", *WITHOUT_DEPENDENCIES, "-e", ROOT], check=True)
        ready.touch()
    return str(python)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measurement session: its interpreter, its folder and its CSV."""

    python: str
    threads: int
    folder: Path
    csv: Path

    def measure(self, loads: Mapping[str, Workload], *, only: Sequence[str] | None, peers: bool) -> dict[str, Workload]:
        """Rounds of all variants in shuffled order, a CSV row at a time; returns the workloads with the chunk of ours."""
        ready: dict[str, Workload] = {}
        for name, load in loads.items():
            needed = dict.fromkeys(v.reference for v in self.choose(load, only, peers) if v.reference)
            answer = self.process(Task(workload=load, references=str(self.folder), needed=tuple(needed)))
            ready[name] = load.with_chunk(load.chunk or answer["default_chunk"])
            said = ", ".join(f"{divergence} {loss:.4f}" for divergence, loss in answer["losses"].items())
            print(f"{name}: mean nats per token in float64: {said}", file=sys.stderr, flush=True)
        with self.csv.open("w", newline="") as file:
            csv.DictWriter(file, fieldnames=COLUMNS, lineterminator="\n").writeheader()
        for index in range(max(load.rounds for load in ready.values())):
            for load in ready.values():
                chosen = self.choose(load, only, peers) if index < load.rounds else []
                for variant in random.Random(index).sample(chosen, len(chosen)):
                    self.write(self.one(load, variant, index))
        return ready

    @staticmethod
    def choose(load: Workload, only: Sequence[str] | None, peers: bool) -> list[Variant]:
        return [variant for variant in variants(load, peers=peers) if not only or variant.name in only]

    def one(self, load: Workload, variant: Variant, index: int) -> Row:
        """One fresh process of one variant."""
        busy = os.getloadavg()[0]
        task = Task(workload=load, variant=variant, references=str(self.folder), check=index == 0, threads=self.threads)
        found = self.process(task)
        row = Row(
            workload=load.name,
            variant=variant.name,
            divergence=variant.divergence,
            chunk=variant.chunk,
            round=index,
            cpu_ms=1000 * min(found["cpu"]),
            wall_ms=1000 * min(found["wall"]),
            peak_mib=found["peak_mib"],
            loss=found["loss"],
            error_hidden=found["errors"].get("hidden"),
            error_weight=found["errors"].get("weight"),
            cpu_ms_all=" ".join(f"{1000 * seconds:.1f}" for seconds in found["cpu"]),
            load=busy,
            date=time.strftime("%Y-%m-%d"),
            threads=self.threads,
            cpu=cpu_name(),
            versions=" ".join(f"{k}={v}" for k, v in found["versions"].items()),
        )
        label = f"{row.variant} {row.divergence} {row.chunk or ''}"
        print(
            f"{index} {load.name} {label:40s} {row.cpu_ms:8.1f} ms {row.peak_mib:8.1f} MiB", file=sys.stderr, flush=True
        )
        return row

    def process(self, task: Task) -> Any:
        """Runs the task in benchmarks/kernels/worker.py; returns its JSON."""
        task_path, result_path = self.folder / "task.json", self.folder / "result.json"
        task.write(task_path)
        result_path.unlink(missing_ok=True)
        threads = str(task.threads)
        environment = os.environ | {
            "PYTHONPATH": str(ROOT / "src"),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
            "TRL_EXPERIMENTAL_SILENCE": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        done = subprocess.run(
            [self.python, "-m", "benchmarks.kernels.worker", str(task_path), str(result_path)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode or not result_path.exists():
            what = task.variant or "the float64 references"
            raise SystemExit(f"{task.workload.name}, {what} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads(result_path.read_text())

    def write(self, row: Row) -> None:
        with self.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=COLUMNS, lineterminator="\n")
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()})


def read_rows(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return [row_from_csv(cells) for cells in csv.DictReader(file)]


def with_measured_chunk(load: Workload, rows: Sequence[Row]) -> Workload:
    """The workload with the chunk that ours ran at, in rows of an earlier run."""
    chunks = {row.chunk for row in rows if (row.workload, row.variant) == (load.name, "ours")}
    return replace(load, chunk=chunk) if len(chunks) == 1 and (chunk := chunks.pop()) else load


def cpu_name() -> str:
    """The processor's name and how many of it the machine shows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} logical CPUs"

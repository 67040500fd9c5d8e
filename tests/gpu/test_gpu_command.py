"""`python -m benchmarks gpu`: every part runs, what is missing is named, and a run that is cut off leaves what it had."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.results import Report, Row, markdown_table
from benchmarks.gpu.sheet import CheckFailed, Sheet

ROOT = Path(__file__).parents[2]
HIDDEN = ("tyro", "pydantic")
LIMIT = 600


def start(out: Path, *words: str, hidden: tuple[str, ...] = (), site: Path | None = None) -> subprocess.Popen[str]:
    """The command as `make gpu` starts it, without installation; `hidden` packages cannot be imported by any of its processes."""
    paths = ["src"]
    if site is not None:
        site.mkdir()
        lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in hidden)]
        (site / "sitecustomize.py").write_text("\n".join(lines) + "\n")
        paths.insert(0, str(site))
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "gpu", "--device", "cpu", "--rehearse", "--out", str(out), *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rows_in(out: Path) -> list[dict]:
    (path,) = out.glob("*.json")
    return json.loads(path.read_text())["rows"]


@pytest.mark.endurance
@pytest.mark.timeout(LIMIT + 60)
def test_every_part_runs_at_tiny_sizes_and_every_check_holds(tmp_path: Path):
    process = start(tmp_path)
    said, errors = process.communicate(timeout=LIMIT)
    rows = rows_in(tmp_path)
    wrong = [row for row in rows if row["verdict"] in ("FAIL", "not reached")]
    assert (process.returncode, wrong) == (0, []), f"{said[-3000:]}\n{errors[-3000:]}"
    assert list(dict.fromkeys(row["part"] for row in rows)) == [part.name for part in PARTS]
    assert sum(row["verdict"] == "ok" for row in rows) >= 40
    (page,) = tmp_path.glob("*.md")
    assert page.read_text() in said


@pytest.mark.slow
@pytest.mark.timeout(LIMIT + 60)
def test_parts_that_need_a_missing_package_are_named_and_the_rest_runs(tmp_path: Path):
    process = start(tmp_path / "out", "--only", "step", "run", "verl", hidden=HIDDEN, site=tmp_path / "site")
    _, errors = process.communicate(timeout=LIMIT)
    rows = rows_in(tmp_path / "out")
    assert process.returncode == 0, errors[-3000:]
    skipped = {row["part"]: row for row in rows if row["case"] == row["part"]}
    assert {part: row["verdict"] for part, row in skipped.items()} == {"step": "skipped", "run": "skipped"}
    assert "needs pydantic, which" in skipped["step"]["note"]
    assert "needs tyro, pydantic, which" in skipped["run"]["note"]
    assert all("`make gpu-wheels` fetches" in row["note"] for row in skipped.values())
    assert {row["part"] for row in rows if row["verdict"] == "ok"} == {"verl"}


@pytest.mark.slow
@pytest.mark.timeout(LIMIT + 60)
def test_a_run_that_is_killed_leaves_its_finished_cases_and_no_process(tmp_path: Path):
    process = start(tmp_path, "--only", "truth")
    began = time.monotonic()
    while time.monotonic() - began < LIMIT and not (list(tmp_path.glob("*.json")) and rows_in(tmp_path)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    (worker,) = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert all(row["case"] for row in rows_in(tmp_path))
    (page,) = tmp_path.glob("*.md")
    assert "`truth` was still running" in page.read_text()
    while Path(f"/proc/{worker}").exists() and "Z" not in state(worker):
        assert time.monotonic() - began < LIMIT, "the worker outlived the command"
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def state(pid: int) -> str:
    try:
        return re.findall(r"^State:\s+(\w)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[0]
    except FileNotFoundError:
        return "Z"


def test_a_gpu_sized_run_on_a_cpu_is_refused_with_what_to_do():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "gpu", "--device", "cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "--rehearse" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_machine_without_a_gpu_is_told_of_the_rehearsal(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "gpu", "--out", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": "src"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert "--device cpu --rehearse" in done.stderr
    assert not list(tmp_path.iterdir())


def sheet(tmp_path: Path, seconds: float = 60.0) -> Sheet:
    return Sheet(
        part="truth",
        rows=tmp_path / "rows.jsonl",
        device=torch.device("cpu"),
        rehearse=True,
        deadline=time.monotonic() + seconds,
    )


def failing() -> dict:
    raise CheckFailed("off by a half", {"error": 0.5})


def broken() -> dict:
    raise ZeroDivisionError("1 / 0")


def out_of_memory() -> dict:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB.")


@pytest.mark.parametrize(
    ("measure", "options", "verdict", "note"),
    [
        (lambda: {"error": 0.1}, {"judged": True}, "ok", ""),
        (lambda: {"ms": 3.0}, {}, "", ""),
        (failing, {"judged": True}, "FAIL", "off by a half"),
        (broken, {}, "FAIL", "ZeroDivisionError: 1 / 0"),
        (out_of_memory, {}, "", "CUDA out of memory"),
        (failing, {"needs": ("no_such_package",)}, "skipped", "no_such_package"),
        (failing, {"seconds": 61}, "not reached", "the time of this part was over"),
    ],
)
def test_a_case_becomes_one_row_with_its_verdict(tmp_path: Path, measure, options, verdict, note):
    made = sheet(tmp_path)
    made.case("table", "case", measure, **options)
    (row,) = [json.loads(line) for line in made.rows.read_text().splitlines()]
    assert row["verdict"] == verdict
    assert note in row["note"]


def test_what_failed_comes_first_on_the_page_with_its_reason():
    good = Row(part="truth", table="errors", case="fine", verdict="ok", cells={"error": 1e-7})
    bad = Row(part="kernels", table="times", case="ours", verdict="FAIL", note="slower than light")
    page = Report(command="python -m benchmarks gpu", about={"device": "NVIDIA H100"}, rows=[good, bad]).markdown()
    assert page.index("- FAIL: kernels, times, ours: slower than light") < page.index("## truth")
    assert "| fine | 1e-07 | ok |" in page


def test_a_table_has_every_column_of_its_rows_and_turns_when_they_are_many():
    few = [Row(part="step", table="t", case=c, cells=cells) for c, cells in (("a", {"x": 1}), ("b", {"y": 1234.5}))]
    assert markdown_table(few) == ["| case | x | y |", "|---|---:|---:|", "| a | 1 |  |", "| b |  | 1234 |"]
    wide = [Row(part="step", table="t", case="a", cells={f"quantity {n}": n for n in range(12)})]
    assert markdown_table(wide)[:3] == ["| case | a |", "|---|---:|", "| quantity 0 | 0 |"]


def test_a_wrong_gradient_is_a_failed_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The part `truth` sees a gradient that is off by a thousandth."""
    from benchmarks.gpu import truth

    from opd.kernels import api

    made = sheet(tmp_path)
    case = truth.Case(
        shape="odd",
        model="unrelated",
        dtype="float32",
        impl="chunked",
        kind="hidden",
        settings=(("divergence", "reverse_kl"),),
    )
    assert truth.check(made, [case])["held"] == 1
    right = api.run_chunks

    def wrong(student, rows, row_pass_of):
        found = right(student, rows, row_pass_of)
        student.hidden_grad *= 1.001
        return found

    monkeypatch.setattr(api, "run_chunks", wrong)
    with pytest.raises(CheckFailed, match="d_hidden"):
        truth.check(made, [case])

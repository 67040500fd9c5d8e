"""The benchmark of ranks: its page is that of its CSV, it compares the same steps, and it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import RESULTS, ROOT
from benchmarks.ranks.command import ONE, check, page, ratio
from benchmarks.rows import Row, read


def rows(**more: str) -> list[Row]:
    """Two rounds of one process and of two ranks, whose second round is the faster one."""
    found = []
    for number, (own, theirs) in enumerate((("8.0", "5.0"), ("6.0", "3.0"))):
        for way, seconds in ((ONE, own), ("ddp", theirs)):
            step = {"way": way, "round": str(number), "step": "1", "tokens": "90", "loss": "0.5"}
            found.append({**step, "seconds": seconds, "cpu_seconds": seconds, **(more if way != ONE else {})})
    return found


def test_ratios_are_taken_within_a_round():
    assert ratio(rows(), "ddp", "seconds") == pytest.approx((8 / 5 + 6 / 3) / 2)
    assert ratio(rows(), ONE, "seconds") == 1


@pytest.mark.parametrize("more", [{"tokens": "91"}, {"loss": "0.501"}])
def test_ways_that_took_other_steps_are_not_compared(more):
    check(rows())
    with pytest.raises(SystemExit, match="differ"):
        check(rows(**more))


def test_the_page_is_that_of_its_csv():
    assert page(read(RESULTS / "ranks.csv")) == (RESULTS / "ranks.md").read_text("utf-8")


def test_numbers_of_the_page_are_those_that_the_docs_quote():
    kept, said = read(RESULTS / "ranks.csv"), (ROOT / "docs" / "several-gpus.md").read_text("utf-8")
    text, ways = " ".join(said.split()), ("ddp", "fsdp2")
    assert all(f"`{way}` {ratio(kept, way, 'seconds'):.2f} times" in text for way in ways)
    assert " and ".join(f"{ratio(kept, way, 'cpu_seconds'):.2f}" for way in ways) + " times" in text


@pytest.mark.slow
def test_two_steps_of_every_way_run(tmp_path: Path):
    tiny = [
        "--rounds",
        "1",
        "--steps",
        "2",
        "--ranks",
        "2",
        "--prompts",
        "4",
        "--tokens",
        "6",
        "--hidden",
        "32",
        "--layers",
        "1",
        "--vocabulary",
        "300",
    ]
    subprocess.run(
        [sys.executable, "-m", "benchmarks", "ranks", *tiny, "--results", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])},
        check=True,
        capture_output=True,
        timeout=300,
    )
    found = read(tmp_path / "ranks.csv")
    assert [(one["way"], one["ranks"]) for one in found] == [(ONE, "1"), ("ddp", "2"), ("fsdp2", "2")]
    assert all(float(one["seconds"]) > 0 and float(one["cpu_seconds"]) > 0 for one in found)

"""The pages quote the runs on a real model as their CSV has them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from benchmarks.real import pages
from benchmarks.real.store import Store

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "real"
INTERVAL = re.compile(r"(\d+(?:\.\d+)?) \((\d+(?:\.\d+)?) to (\d+(?:\.\d+)?)\)")


def test_tables_figure_and_headline_are_written_again_from_the_runs(tmp_path, monkeypatch: pytest.MonkeyPatch):
    original = pages.SOONER.read_text("utf-8")
    blank = re.sub(f"{pages.START}.*?<!-- end -->", f"{pages.START}<!-- end -->", original, count=1, flags=re.S)
    assert blank != original
    page = tmp_path / "sooner.md"
    page.write_text(blank, encoding="utf-8")
    monkeypatch.setattr(pages, "SOONER", page)
    shutil.copy(RESULTS / "runs.csv", tmp_path)
    pages.write_pages(tmp_path, Store(tmp_path / "runs.csv"))
    assert page.read_text("utf-8") == original
    for name in ("tables.md", "curves.svg"):
        assert (tmp_path / name).read_text("utf-8") == (RESULTS / name).read_text("utf-8"), name


@pytest.mark.parametrize(
    ("path", "heading", "least"), [("README.md", "## How much sooner", 1), ("docs/sooner.md", "## A real", 1)]
)
def test_every_interval_in_the_prose_is_in_the_tables(path: str, heading: str, least: int):
    section = (ROOT / path).read_text("utf-8").split(heading)[1].split("\n## ")[0]
    prose = INTERVAL.findall(re.sub(f"{pages.START}.*?<!-- end -->", "", section, flags=re.S))
    known = INTERVAL.findall((RESULTS / "tables.md").read_text("utf-8"))
    known += INTERVAL.findall((ROOT / "benchmarks/results/convergence/tables.md").read_text("utf-8"))
    assert len(prose) >= least
    assert all(said in known for said in prose), [said for said in prose if said not in known]

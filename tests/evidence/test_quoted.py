"""The pages quote the convergence benchmark as its CSVs have it."""

from __future__ import annotations

import re
import shutil
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest
from benchmarks.convergence import distiller, outside, pages, plan
from benchmarks.convergence.store import Store

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "convergence"
INTERVAL = re.compile(r"(\d+(?:\.\d+)?),? [(\[]?(\d+(?:\.\d+)?) to (\d+(?:\.\d+)?)[)\]]")


@pytest.mark.endurance
def test_every_table_and_figure_is_written_again_from_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = Path(shutil.copytree(RESULTS, tmp_path / "convergence"))
    written = ["ratios.csv", "tables.md", "curves.svg", "map.svg"]
    for name in written:
        (folder / name).unlink()
    copies = {
        ROOT / "docs" / "sooner.md": tmp_path / "sooner.md",
        ROOT / "benchmarks" / "README.md": tmp_path / "benchmarks.md",
    }
    for original, copy in copies.items():
        kept = re.sub(f"{pages.START}.*?{pages.END}", pages.START + pages.END, original.read_text("utf-8"), flags=re.S)
        assert kept != original.read_text("utf-8")
        copy.write_text(kept, encoding="utf-8")
    sooner, tables = copies.values()
    monkeypatch.setattr(pages, "SOONER", sooner)
    monkeypatch.setattr(pages, "README", tables)
    pages.write_pages(folder, Store(folder / "grid.csv"), Store(folder / "runs.csv"))
    for original, copy in copies.items():
        assert copy.read_text("utf-8") == original.read_text("utf-8")
    for name in written:
        assert (folder / name).read_text("utf-8") == (RESULTS / name).read_text("utf-8"), name


def rounded(number: str, like: str) -> str:
    """With as many decimals as `like`."""
    return str(Decimal(number).quantize(Decimal(like), rounding=ROUND_HALF_UP))


@pytest.mark.parametrize(
    ("path", "heading", "least"),
    [
        ("README.md", "## How much sooner", 2),
        ("docs/sooner.md", "## A toy", 10),
        ("benchmarks/README.md", "## Convergence: how much sooner", 9),
    ],
)
def test_every_interval_in_the_prose_is_in_the_tables(path: str, heading: str, least: int):
    section = (ROOT / path).read_text("utf-8").split(heading)[1].split("\n## ")[0]
    prose = INTERVAL.findall(re.sub(f"{pages.START}.*?{pages.END}", "", section, flags=re.S))
    if path == "docs/sooner.md":
        prose += INTERVAL.findall(section)
    known = INTERVAL.findall((RESULTS / "tables.md").read_text("utf-8"))
    if path == "README.md":  # which names the real model beside the toy
        known += INTERVAL.findall((ROOT / "benchmarks" / "results" / "real" / "tables.md").read_text("utf-8"))
    assert len(prose) >= least
    for said in prose:
        alike = [k for k in known if all(rounded(a, b) == b for a, b in zip(k, said, strict=True))]
        assert alike, f"{path} says {said[0]} ({said[1]} to {said[2]}), and no table does"


def test_both_pages_quote_the_row_of_the_product_s_own_trainer():
    runs = outside.read_runs(RESULTS / "distiller.csv")
    seeds = {name: [r.seed for r in runs if r.trainer == name] for name in (distiller.LOOP, distiller.DISTILLER)}
    assert all(found == list(plan.SEEDS) for found in seeds.values())
    tables = (RESULTS / "tables.md").read_text("utf-8").split(distiller.TITLE)[1].split("\n## ")[0]
    (row,) = [line for line in tables.splitlines() if line.startswith(f"| {distiller.DISTILLER} |")]
    to_80 = INTERVAL.findall(row)[outside.LEVELS.index(80)]
    for path in ("docs/sooner.md", "benchmarks/README.md"):
        text = (ROOT / path).read_text("utf-8")
        said = re.findall(r"`opd\.Distiller`,\s+takes\s+([^%]*)\s+%", text)
        assert [INTERVAL.findall(one) for one in said] == [[to_80]], path
    (luck,) = re.findall(r"Other samples alone.*?([0-9.]+ to [0-9.]+) at 80 %", tables)
    page = (ROOT / "docs/sooner.md").read_text("utf-8")
    assert re.search(rf"other\s+samples\s+alone\s+give\s+the\s+loop\s+{luck}\.", page)

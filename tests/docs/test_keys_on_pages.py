"""Pages that advise keys: every key of a recipe that they name exists, takes the value beside it, and every recipe in them is accepted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from opd.config import Config
from opd.config.run import RunSettings
from opd.config.sections import all_keys, hint_of

ROOT = Path(__file__).parents[2]
PAGES = ["moving.md", "comparison.md", "choosing.md"]
KEYS = set(all_keys(RunSettings))
SECTIONS = {key.rsplit(".", depth)[0] for key in KEYS for depth in range(1, key.count(".") + 1)}
ROOTS = {name.partition(".")[0] for name in SECTIONS}
CODE = re.compile(r"`([^`]+)`")
NAMED = re.compile(r"(?P<key>[a-z_]+(?:\.[A-Za-z_]+)+)(?:: (?P<value>.+))?")
NUMBER = re.compile(r"(?<![\w.,])\d+(?:[.,]\d+)*")
INTERVAL = re.compile(r"-?[\d.]+%? \(-?[\d.]+ to -?[\d.]+\)")
A_LINE_FOR_EACH_COLUMN = {"verl_native.md", "kept.md", "loop.md", "kernels.md"}
RECIPE = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)


def text(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def rows(page: str) -> list[list[str]]:
    """Cells of every line of a table; a `|` inside code would split a cell, so pages have none."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text(page).splitlines() if line[:1] == "|"
    ]


def told(page: str) -> list[tuple[str, str | None]]:
    """Keys of opd in inline code, with the value after a colon. The first column of moving.md has those of other libraries."""
    lines = re.sub(r"```.*?```", "", text(page), flags=re.DOTALL).splitlines()
    kept = [" ".join(line for line in lines if line[:1] != "|")]
    for cells in rows(page):
        kept += cells[1:] if page == "moving.md" else cells
    found = (NAMED.fullmatch(code) for line in kept for code in CODE.findall(line))
    return [(m["key"], m["value"]) for m in found if m and m["key"].partition(".")[0] in ROOTS]


@pytest.mark.parametrize(("page", "at_least"), [("moving.md", 70), ("choosing.md", 40), ("comparison.md", 0)])
def test_every_key_that_the_page_names_exists(page, at_least):
    named = {key for key, _ in told(page)}
    assert len(named) >= at_least, "the page names hardly any key; does this test still read it?"
    assert sorted(key for key in named if key not in KEYS | SECTIONS) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_value_beside_a_key_is_one_that_the_key_takes(page):
    for key, value in told(page):
        if value is not None and key in KEYS:
            TypeAdapter(hint_of(RunSettings, key)).validate_python(yaml.safe_load(value.replace("…", "")))


@pytest.mark.parametrize(
    ("page", "recipe"), [(page, found) for page in PAGES for found in RECIPE.findall(text(page)) if "model:" in found]
)
def test_every_recipe_of_the_page_is_accepted(page, recipe):
    Config(**yaml.safe_load(recipe))


@pytest.mark.parametrize("page", PAGES)
def test_every_number_of_a_measured_row_stands_in_the_file_that_the_row_names(page):
    """The last cell of such a row names files of this repository in code. All numbers of the row stand in one line of them, unless the
    source has a line for each column; numbers are compared as they are written, and intervals with their mean."""
    for cells in rows(page):
        files = [ROOT / name for name in CODE.findall(cells[-1]) if (ROOT / name).is_file()]
        if not files:
            continue
        lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        told_here = [CODE.sub("", cell) for cell in cells[1:-1]]
        numbers = [set(NUMBER.findall(cell)) for cell in told_here]
        spread = any(file.name in A_LINE_FOR_EACH_COLUMN for file in files) or cells[0].endswith(", tuned")
        together = [{number} for row in numbers for number in row] if spread else [set().union(*numbers)]
        written = [set(NUMBER.findall(line)) for line in lines]
        missing = [wanted for wanted in together if not any(wanted <= line for line in written)]
        assert missing == [], f"{page}: {cells}: not in {[file.name for file in files]}: {missing}"
        intervals = [found for cell in told_here for found in INTERVAL.findall(cell)]
        assert [one for one in intervals if not any(one in line for line in lines)] == [], f"{page}: {cells}"


def test_choosing_and_comparison_have_measured_rows():
    measured = {
        page: sum(any((ROOT / name).is_file() for name in CODE.findall(cells[-1])) for cells in rows(page))
        for page in PAGES
    }
    assert measured["choosing.md"] >= 15 and measured["comparison.md"] >= 4

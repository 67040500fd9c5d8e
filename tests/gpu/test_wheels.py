"""The wheels of `make gpu-wheels` are all that a bare machine lacks, and they fit each other: pip fetches them without looking."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
THERE = {
    "torch", "transformers", "safetensors", "httpx", "filelock", "pyyaml", "rich", "jinja2", "numpy", "anyio",
    "typing-extensions",
}  # fmt: skip
"""What comes with PyTorch, transformers, rich and Jinja2, or is one of them."""


def pins() -> dict[str, str]:
    lines = (ROOT / "benchmarks" / "gpu" / "requirements.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.strip().lower().replace("_", "-"): pin.strip() for name, pin in pairs}


def name_of(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0].lower().replace("_", "-")


def test_every_package_that_opd_needs_is_there_or_fetched():
    tomllib = pytest.importorskip("tomllib", reason="of Python 3.11 and later")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [name_of(line) for line in project["dependencies"]]
    assert len(set(needed)) == len(needed), "a dependency is named twice"
    assert set(needed) - THERE <= pins().keys()
    assert set(needed) >= THERE, "the list above names what opd does not need any more"


@pytest.mark.parametrize("name", sorted(pins()))
def test_a_package_that_insists_on_a_version_gets_it(name: str):
    """pydantic refuses to be imported beside any other pydantic-core than its own."""
    try:
        if version(name) != pins()[name]:
            pytest.skip(f"another {name} is installed here")
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed here")
    for requirement in requires(name) or []:
        wanted = re.fullmatch(
            r"\(?==\s*([\w.]+)\)?", requirement.split(";")[0].strip()[len(name_of(requirement)) :].strip()
        )
        if wanted and "extra ==" not in requirement:
            assert pins()[name_of(requirement)] == wanted[1]

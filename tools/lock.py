"""Locks a constraints file: its pins stay, and the versions of everything else in an environment are written below them.

`python tools/lock.py constraints.txt .venv/bin/python 3.10` locks; the last word is the lowest Python that the file is for.
`python tools/lock.py --unlock constraints.txt …` keeps the pins alone, so that pip chooses anew. `make lock` and `make renew` call it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

LINE = "# Everything else, written by `make lock`."
LEFT_OUT = {"opd", "pip", "triton"}
"""The project, its installer, and Triton, of which a CUDA build of PyTorch brings its own."""
LIST = """
import json, sys
from importlib.metadata import distributions
from pip._vendor.packaging.specifiers import SpecifierSet

lowest = int(sys.argv[1].split(".")[1])
found = []
for dist in distributions():
    allowed = SpecifierSet(dist.metadata.get("Requires-Python") or "")
    first = next(minor for minor in range(lowest, 99) if allowed.contains(f"3.{minor}.99"))
    found.append([dist.metadata["Name"], dist.version, None if first == lowest else f"3.{first}"])
print(json.dumps(found))
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> str:
    """The part of the file that people write."""
    return path.read_text(encoding="utf-8").split(LINE)[0].rstrip() + "\n"


def locked(python: str, lowest: str, pinned: set[str]) -> list[str]:
    """A line for every distribution of the environment that has no pin."""
    done = subprocess.run([python, "-c", LIST, lowest], capture_output=True, text=True, check=True)
    lines = {}
    for name, version, first in json.loads(done.stdout):
        if canonical(name) not in LEFT_OUT | pinned and not name.startswith("nvidia-"):
            marker = "" if first is None else f'; python_version >= "{first}"'
            lines[canonical(name)] = f"{name}=={version.split('+')[0]}{marker}"
    return [lines[name] for name in sorted(lines)]


def main(words: list[str]) -> None:
    if words[0] == "--unlock":
        for path in map(Path, words[1:]):
            path.write_text(pins(path), encoding="utf-8")
        return
    path, python, lowest = Path(words[0]), words[1], words[2]
    kept = pins(path)
    pinned = {canonical(name) for name in re.findall(r"^([A-Za-z][\w.-]*)==", kept, flags=re.M)}
    path.write_text("\n".join([kept, LINE, *locked(python, lowest, pinned)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

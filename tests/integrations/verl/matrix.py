"""Which hooks each release of verl has: `python tests/integrations/verl/matrix.py [VERSION …]` prints a table.

Wheels are downloaded without their requirements, and only read: no release needs to be installed, none is imported.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from opd.integrations.verl.contract.source_check import BY_PART, Moved, moved, version_of

RELEASES = ("0.8.0", "0.9.0", "0.9.1")
DOWNLOAD_SECONDS = 120.0


class NoDownload(Exception):
    """The package index could not be reached, or has no such release."""


def unpacked(version: str, folder: Path) -> Path:
    """The folder `verl` of a release, below `folder`."""
    here = folder / version
    if (here / "verl").exists():
        return here / "verl"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(here), f"verl=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
    if done.returncode != 0:
        raise NoDownload(f"verl {version} cannot be downloaded: {done.stderr[-500:]}")
    (wheel,) = here.glob("verl-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(here)
    wheel.unlink()
    assert version_of(here / "verl") == version
    return here / "verl"


def table(found: dict[str, list[Moved]]) -> str:
    """A row for every part of the plugin: how many of its hooks each release has; then each hook that is missing somewhere."""
    lines = [f"| part | hooks | {' | '.join(found)} |", f"|---|---:|{'---:|' * len(found)}"]
    for part, hooks in BY_PART.items():
        counts = [str(len(hooks) - sum(gone.hook in hooks for gone in missing)) for missing in found.values()]
        lines.append(f"| {part} | {len(hooks)} | {' | '.join(counts)} |")
    lines.append("")
    for version, missing in found.items():
        lines += [f"{version}: {gone}" for gone in missing] or [f"{version}: all there"]
    return "\n".join(lines)


def main(versions: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        found = {version: moved(unpacked(version, Path(folder))) for version in versions or RELEASES}
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

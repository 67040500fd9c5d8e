"""A release of verl from the package index, kept in a cache: the tree that a patch is made against."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

from opd.errors import ConfigError

SUPPORTED = ("0.8.0", "0.9.0", "0.9.1")
DOWNLOAD_SECONDS = 300


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/opd/verl, by default ~/.cache/opd/verl."""
    base = os.environ.get("XDG_CACHE_HOME", "").strip()
    return (Path(base) if base else Path.home() / ".cache") / "opd" / "verl"


def read_release(version: str, archive: Path | None = None) -> dict[str, bytes]:
    """Path in the tree → content, of the wheel or source archive; downloaded once where none is given. Raises ConfigError."""
    if archive is None:
        archive = _downloaded(version)
    elif not archive.is_file():
        raise ConfigError(f"{archive} is not a file; give a wheel or source archive of verl {version}.")
    files = _unpacked(archive)
    found = files.get("verl/version/version", b"").decode().strip()
    if found != version:
        raise ConfigError(
            f"{archive} holds verl {found or '(no version)'}, not {version}; give the archive of that version."
        )
    return files


def _downloaded(version: str) -> Path:
    folder = cache_folder() / version
    kept = sorted(folder.glob(f"verl-{version}*"))
    if kept:
        return kept[0]
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    try:
        done = subprocess.run(
            [*pip, "--dest", str(folder), f"verl=={version}"],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_SECONDS,
            check=False,
        )
        said = (done.stderr or done.stdout).strip()
    except subprocess.TimeoutExpired:
        said = f"nothing came in {DOWNLOAD_SECONDS} s"
    kept = sorted(folder.glob(f"verl-{version}*"))
    if not kept:
        reason = next((line for line in said.splitlines() if line.startswith("ERROR")), said[-300:])
        raise ConfigError(
            f"verl {version} could not be downloaded into {folder} ({reason}). Is the package index reachable? Else pass --archive FILE "
            "with a wheel or source archive that you have, or put one there."
        )
    return kept[0]


def _unpacked(archive: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as held:
            for name in held.namelist():
                if not name.endswith("/"):
                    files[name] = held.read(name)
        return files
    if not tarfile.is_tarfile(archive):
        raise ConfigError(f"{archive} is neither a wheel nor a source archive; remove it, or give another.")
    with tarfile.open(archive) as held:
        for member in held.getmembers():
            content = held.extractfile(member) if member.isfile() else None
            if content is not None:
                files["/".join(PurePosixPath(member.name).parts[1:])] = content.read()
    return files

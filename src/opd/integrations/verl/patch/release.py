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
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        f"verl=={version}",
        "--no-deps",
        "--quiet",
        "--dest",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
    kept = sorted(folder.glob(f"verl-{version}*"))
    if done.returncode or not kept:
        raise ConfigError(
            f"verl {version} could not be downloaded: {(done.stderr or done.stdout).strip().splitlines()[-1:]}. Pass --archive FILE with a "
            "wheel or source archive that you have."
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
    with tarfile.open(archive) as held:
        for member in held.getmembers():
            content = held.extractfile(member) if member.isfile() else None
            if content is not None:
                files["/".join(PurePosixPath(member.name).parts[1:])] = content.read()
    return files

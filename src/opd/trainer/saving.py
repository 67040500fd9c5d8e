"""The trained student as an ordinary Hugging Face folder: its dtype, its files, its model card, and the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from opd.config.save import SaveConfig
from opd.errors import RunFolderError
from opd.models import is_adapted
from opd.quantized import merged
from opd.reporting.card import model_card
from opd.reporting.files import explain_os_errors, write_atomically
from opd.tokenizer import write_own_files
from opd.trainer.checkpoint import behind_link, publish
from opd.trainer.from_config import RunComponents
from opd.trainer.run_folder import RunFolder

CARD_FILE = "README.md"
ADAPTER_FOLDER = "adapter"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def save_student(components: RunComponents, folder: RunFolder) -> Any:
    """The trained student as an ordinary Hugging Face folder, and the model itself; adapters are merged, and kept beside it in
    adapter/."""
    model: Any = components.whole_student()
    dtype = components.saved_dtype
    with explain_os_errors("save the student to", folder.student):
        if is_adapted(model):
            save_adapter(model, folder.path / ADAPTER_FOLDER, dtype)
            model = merged(model)
        write_student(model, components.loaded.files, folder.student, "continue with --resume", dtype)
    return model


def write_student(
    model: Any, files: Mapping[str, bytes], place: Path, then: str, dtype: torch.dtype | None = None
) -> None:
    """Model and tokenizer files as a Hugging Face folder, whole or not at all. The weights are rounded to `dtype`, which None leaves as
    it is; the model itself keeps its own. Raises RunFolderError on a full disk; `then` is what to do with some space freed."""
    final = behind_link(place)
    temporary = final.with_name(f".writing-{final.name}")
    with explain_os_errors("save the student to", place):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            if dtype in (None, model.dtype) or not _fits(model, dtype):
                model.save_pretrained(temporary)
            else:
                model.save_pretrained(temporary, state_dict=_rounded(model, dtype))
                _name_dtype(temporary / "config.json", model.dtype, dtype)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise RunFolderError(
                f"Cannot save the student to {place}: {error}. Free some space, then {then}."
            ) from error
        write_own_files(files, temporary)
        publish(temporary, final)


def saved_as(folder: Path) -> str:
    """The dtype that the config.json of a saved student names; empty without one."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(found.get("dtype") or "")


def write_cards(folder: RunFolder, summary: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> None:
    """The model card of student/, and of adapter/ where there is one. Raises RunFolderError."""
    for name, adapter in ((folder.student.name, False), (ADAPTER_FOLDER, True)):
        place = folder.path / name
        if place.is_dir():
            text = model_card(folder.path, summary, settings, dtype=saved_as(folder.student), adapter=adapter)
            write_atomically(place / CARD_FILE, text.encode("utf-8", "backslashreplace"))


def push_student(student: Path, save: SaveConfig) -> str:
    """Upload the folder, and say where it is; or why it is not there, and how it is uploaded by hand. Raises nothing."""
    from huggingface_hub import HfApi

    name = save.push_to_hub or ""
    try:
        api = HfApi()
        made = api.create_repo(name, private=save.private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=student, commit_message="The student of an opd run")
    except Exception as error:  # the network, the hub, the account: all fail in their own ways, and the run is done
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return (
            f"The student is in {student} and not on the hub ({reason}). Upload it by hand: hf auth login, then "
            f"hf upload {name} {student}{' --private' if save.private else ''}"
        )
    return f"The student is on the hub: {made}"


def _rounded(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights in `dtype`, in main memory; those that the architecture keeps in float32, and what is no float, as they are. Tied
    weights stay one tensor, by which save_pretrained knows them."""
    kept = [
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    ]
    seen: dict[tuple[int, torch.Size, tuple[int, ...]], torch.Tensor] = {}
    found: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if not value.is_floating_point() or any(part in name for part in kept):
            found[name] = value
            continue
        key = (value.data_ptr(), value.shape, value.stride())
        if key not in seen:
            seen[key] = value.to(device="cpu", dtype=dtype)
        found[name] = seen[key]
    return found


def _fits(model: Any, dtype: torch.dtype | None) -> bool:
    """False where float16 would make a weight infinite; the student is then saved as it was trained."""
    if dtype != torch.float16:
        return True
    limit = torch.finfo(torch.float16).max
    return all(bool(value.abs().max() <= limit) for value in model.parameters() if value.numel())


def _name_dtype(file: Path, trained: torch.dtype, saved: torch.dtype | None) -> None:
    """Write the dtype of the saved weights into a config.json, and into its parts."""
    config = json.loads(file.read_text(encoding="utf-8"))
    old, new = (str(one).removeprefix("torch.") for one in (trained, saved))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if part.get("dtype") == old:
            part["dtype"] = new
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_adapter(model: Any, place: Path, dtype: torch.dtype | None = None) -> None:
    """A peft model's adapters alone, rounded to `dtype` if there is one, as a folder that is whole or not there."""
    final = behind_link(place)
    temporary = final.with_name(f".writing-{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    (temporary / CARD_FILE).unlink(missing_ok=True)  # peft's is a form to fill in
    file = temporary / ADAPTER_WEIGHTS
    if dtype is not None and file.exists():
        with safe_open(file, framework="pt") as stored:
            weights = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # it is no mapping
        save_file({name: value.to(dtype) for name, value in weights.items()}, file, metadata={"format": "pt"})
    publish(temporary, final)

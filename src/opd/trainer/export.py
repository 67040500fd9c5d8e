"""A checkpoint as a Hugging Face folder: the student that a run had then, as the run would have saved it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from opd.config.run import RunSettings
from opd.models import resolve_dtype, stored_dtype
from opd.quantized import merged
from opd.reporting.files import explain_os_errors
from opd.reporting.loading import Loading
from opd.trainer.load_trained import load_trained
from opd.trainer.saving import ADAPTER_FOLDER, save_adapter, write_student

AGAIN = "run opd export again"


def export_student(
    settings: RunSettings, checkpoint: Path, out: Path, *, merge: bool, dtype: str, loading: Loading
) -> Sequence[Path]:
    """Write the student of a checkpoint to `out`, and return the folders that can be loaded. Adapters go to out/adapter; with `merge`
    they are merged into the student as well. `dtype` is auto (that of the model that the run began with), or a name.

    Raises ModelError or RunFolderError; `out` then holds nothing new.
    """
    section = replace(settings.student, device="cpu")
    loaded = load_trained(replace(settings, student=section), checkpoint, loading)
    model: Any = loaded.model
    name = stored_dtype(section.model, section.revision) if dtype == "auto" else dtype
    saved = resolve_dtype(name or "float32", torch.device("cpu"))
    loading.begin(f"writing {out}")
    if section.lora is None:
        write_student(model, loaded.files, out, AGAIN, saved)
        return [out]
    with explain_os_errors("export the adapter to", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = out.with_name(f".adapter-{out.name}")
        save_adapter(model, beside, saved)
        if merge:
            write_student(merged(model), loaded.files, out, AGAIN, saved)
        out.mkdir(exist_ok=True)
        shutil.move(beside, out / ADAPTER_FOLDER)
    return [out, out / ADAPTER_FOLDER] if merge else [out / ADAPTER_FOLDER]

"""Checkpoints that a kill at any moment cannot spoil.

A checkpoint is written into a hidden sibling folder, synced, and renamed into place: it is there whole, or not at all. The last good
one is deleted only after a newer one stands.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from opd.durable import sync_folder
from opd.errors import RunFolderError
from opd.optim.offload import HOME, move_moments
from opd.reporting.files import dangling_link, explain_link, remove
from opd.trainer.parts import AVERAGES, FOLDER, WEIGHTS, SavedParts, is_divided_checkpoint
from opd.trainer.student import CHECKPOINT, Student
from opd.trainer.whole import divided_like, divided_state

FORMAT = 1
FULL_DISK = (OSError, RuntimeError, SafetensorError)
"""Exceptions of open, torch.save and save_file on a full disk."""
DAMAGED = (OSError, EOFError, ValueError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError, SafetensorError)
"""Exceptions of reading a file that was cut short or edited."""


def save_checkpoint(folder: Path, student: Student, state: dict[str, Any], *, keep: int) -> Path:
    """Weights, optimizer and `state` of the update that `student.version` counts. Raises RunFolderError on a full disk, leaving
    earlier checkpoints as they are."""
    final = folder / f"step-{student.version:08d}"
    temporary = folder / f".writing-{final.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        if student.divisions is None:
            _write_whole(temporary, student)
        else:
            student.ranks.together(CHECKPOINT, str(temporary / FOLDER))
        (temporary / "state.json").write_text(json.dumps({"format": FORMAT, "version": student.version, **state}))
        _sync(temporary)
        publish(temporary, final)
    except FULL_DISK as error:
        shutil.rmtree(temporary, ignore_errors=True)
        link = dangling_link(folder)
        cure = "Free some space (or lower checkpoint.keep)" if link is None else explain_link(link).rstrip(".")
        raise RunFolderError(
            f"Checkpoint {final.name} cannot be written to '{folder}': {error}. Earlier checkpoints are untouched. {cure}, then "
            "continue with --resume."
        ) from error
    for old in checkpoints(folder)[:-keep]:
        with suppress(OSError):  # one that cannot be deleted only takes space
            remove(old)
    return final


def _write_whole(folder: Path, student: Student) -> None:
    """Weights, averages and the state of every optimizer, of a student that this process has whole."""
    save_file(_in_main_memory(student.trained()), folder / "weights.safetensors")
    if student.ema is not None:
        save_file(_in_main_memory(student.averages()), folder / "ema.safetensors")
    torch.save([optimizer.state_dict() for optimizer in student.optimizers], folder / "optimizer.pt")


def _in_main_memory(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def publish(temporary: Path, final: Path) -> None:
    """Rename a finished folder into place; an older one of that name steps aside first and is deleted last. Of a link, the link
    alone is: what it leads to may be somebody else's."""
    aside = final.with_name(f".old-{final.name}")
    remove(aside)
    if os.path.lexists(final):
        os.rename(final, aside)
    os.rename(temporary, final)
    sync_folder(final.parent)
    with suppress(OSError):
        remove(aside)


def behind_link(place: Path) -> Path:
    """The path to write a folder to: a link to an empty folder was made to be filled, and any other link is replaced."""
    target = place.resolve()
    return target if place.is_symlink() and target.is_dir() and not any(target.iterdir()) else place


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
            continue
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "state.json").exists())


def version_of(checkpoint: Path) -> int:
    """The number of updates that a checkpoint's weights have had."""
    return int(checkpoint.name.removeprefix("step-"))


def load_trained_weights(path: Path, model: torch.nn.Module, student: Student | None = None) -> None:
    """Put a checkpoint's weights into the model that it was made of, and its averages into the `student`'s, where it keeps them; no
    optimizer is read. Raises RunFolderError for a checkpoint that is damaged, or of another model."""
    averages: Mapping[str, torch.Tensor] = {} if student is None else student.averages()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        weights, averages = _read(path, trained, averages, str(next(model.parameters()).device))
    except DAMAGED as error:
        raise RunFolderError(
            f"Checkpoint '{path}' cannot be read: {type(error).__name__}: {str(error)[:300]}. The file was cut short or edited; take "
            "another checkpoint of the run."
        ) from error
    _put(weights, model, path, "Keep it in the folder of the run that wrote it, with that run's config.yaml.")
    if student is not None:
        _put_averages(averages, student)


def _read(
    path: Path, trained: Mapping[str, torch.Tensor], averaged: Mapping[str, torch.Tensor], device: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and averages of a checkpoint, whole or, where they were divided, as these are."""
    if is_divided_checkpoint(path):
        parts = SavedParts(path)
        return parts.named(WEIGHTS, trained), parts.named(AVERAGES, averaged)
    weights = load_file(path / "weights.safetensors", device=device)
    return weights, load_file(path / "ema.safetensors", device=device) if averaged else {}


@torch.no_grad()
def _put(weights: Mapping[str, torch.Tensor], model: torch.nn.Module, path: Path, advice: str) -> None:
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if parameters.keys() != weights.keys() or any(parameters[n].shape != w.shape for n, w in weights.items()):
        raise RunFolderError(f"Checkpoint '{path}' is of another model: parameter names or shapes differ. {advice}")
    for name, parameter in parameters.items():
        parameter.copy_(divided_like(weights[name], parameter))


@torch.no_grad()
def _put_averages(averages: Mapping[str, torch.Tensor], student: Student) -> None:
    for name, average in student.averages().items():
        average.copy_(divided_like(averages[name], average))


def load_checkpoint(path: Path, student: Student) -> dict[str, Any]:
    """Put weights and optimizer back, and return the saved state. Raises RunFolderError when the checkpoint is of another model."""
    device = student.device
    if student.divisions is not None:
        student.divisions.close()
        device = torch.device("cpu")  # there is no room for the whole elsewhere
    try:
        state = json.loads((path / "state.json").read_text())
        weights, averages = _read(path, student.trained(), student.averages(), str(device))
        if is_divided_checkpoint(path):
            optimizers = SavedParts(path).optimizers(student.optimizers)
        else:
            optimizers = torch.load(path / "optimizer.pt", map_location=device, weights_only=True)
        written_by, version = state["format"], int(state["version"])
    except DAMAGED as error:
        raise RunFolderError(
            f"Checkpoint '{path}' cannot be read: {type(error).__name__}: {str(error)[:300]}. The file was cut short or edited. "
            "Delete that folder to resume from the one before it."
        ) from error
    if written_by != FORMAT:
        raise RunFolderError(
            f"Checkpoint '{path}' has format {written_by}, and this version of opd reads {FORMAT}. Resume with the version that wrote it."
        )
    _put(weights, student.model, path, "Resume with the recipe it was made with.")
    _put_averages(averages, student)
    for optimizer, saved in zip(student.optimizers, optimizers, strict=True):
        # The state is the checkpoint's; rates, decays and the like are the recipe's, which may have changed them.
        options = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        optimizer.load_state_dict(divided_state(saved, optimizer))
        for group, own in zip(optimizer.param_groups, options, strict=True):
            group.update(own)
        if student.offload:
            move_moments(optimizer, HOME)
    student.version = version
    return state

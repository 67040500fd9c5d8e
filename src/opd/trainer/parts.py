"""Checkpoints of divided weights, by torch.distributed.checkpoint: every rank writes its parts, and any number of ranks reads them.

The files are safetensors with the place of each part in its header, so that nothing is unpickled. No rank needs room for the whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from opd.errors import RunFolderError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.api import CheckpointException

FOLDER = "parts"
"""Of a checkpoint whose weights were divided; one of whole weights has none."""
WEIGHTS, AVERAGES, OPTIMIZER = "weights/", "ema/", "optimizer/"
"""How names of tensors begin."""
STEP = "step"  # AdamW's count of updates, a number beside the moments


def write_parts(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write this rank's parts of the tensors. Every rank has to; where one fails, such as on a full disk, rank 0 raises its error."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    flat = {
        name: tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach() for name, tensor in tensors.items()
    }
    try:
        save(flat, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        if dist.get_rank() == 0:
            _raise(error)


def is_divided_checkpoint(path: Path) -> bool:
    """True for a checkpoint that `write_parts` wrote."""
    return (path / FOLDER).is_dir()


def read_parts(path: Path, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of these names in a checkpoint, each with the device, dtype and division of `like`'s; each rank for itself.

    Raises RunFolderError for one of another model, and an exception of `checkpoint.DAMAGED` for a file that was cut short or is missing.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    found = {
        name: torch.zeros_like(tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach())
        for name, tensor in like.items()
    }
    check_whole(path, found)
    reader = HuggingFaceStorageReader(str(path / FOLDER))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each rank reads for itself
            load(found, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        _raise(error)
    return {name: value.reshape(like[name].shape) if like[name].dim() == 0 else value for name, value in found.items()}


def read_named(path: Path, beginning: str, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by their own names, of those whose names in the checkpoint begin so. Raises as `read_parts`, and RunFolderError for a
    checkpoint with others."""
    there, here = names_of(path, beginning), {f"{beginning}{name}": tensor for name, tensor in like.items()}
    if other := sorted(there.keys() - here.keys()):
        raise RunFolderError(
            f"Checkpoint '{path}' is of another model: it has {other[0]}, which this one does not train."
        )
    return {name.removeprefix(beginning): value for name, value in read_parts(path, here).items()}


def read_optimizers(path: Path, optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """The state of every optimizer, divided as its parameters are here. Raises as `read_parts`."""
    found = []
    for number, optimizer in enumerate(optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        beginning, like = f"{OPTIMIZER}{number}/", dict[str, torch.Tensor]()
        for key, size in names_of(path, beginning).items():
            place, _, name = key.removeprefix(beginning).partition("/")
            of_parameter = int(place) < len(parameters) and size == parameters[int(place)].shape and name != STEP
            like[key] = parameters[int(place)].detach() if of_parameter else torch.zeros(())
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in read_parts(path, like).items():
            place, _, name = key.removeprefix(beginning).partition("/")
            state.setdefault(int(place), {})[name] = value
        found.append({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return found


def check_whole(path: Path, wanted: Mapping[str, torch.Tensor]) -> None:
    """Raise RunFolderError where the parts are not those of tensors of these shapes; a part that is missing would be read as zeros."""
    saved = _saved(path)
    for name, tensor in wanted.items():
        if name not in saved or saved[name].size != tensor.shape:
            raise RunFolderError(
                f"Checkpoint '{path}' is of another model, or a file of its '{FOLDER}' is missing: {name} is "
                f"{'not there' if name not in saved else f'{tuple(saved[name].size)} there'} and {tuple(tensor.shape)} here."
            )
        there = sum(chunk.sizes.numel() for chunk in saved[name].chunks)
        if there != tensor.numel():
            raise RunFolderError(f"Checkpoint '{path}' lacks a file of its '{FOLDER}': a part of {name} is not there.")


def names_of(path: Path, beginning: str) -> dict[str, torch.Size]:
    """The tensors of a checkpoint whose names begin so, with their shapes."""
    return {name: entry.size for name, entry in _saved(path).items() if name.startswith(beginning)}


def _saved(path: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(path / FOLDER)).read_metadata().state_dict_metadata


def _raise(error: CheckpointException) -> NoReturn:
    """Raise what failed on the first rank that failed: a CheckpointException is no Exception, and holds those of all ranks."""
    rank, (cause, _trace) = next(iter(error.failures.items()))
    if isinstance(cause, Exception):
        raise cause
    raise RuntimeError(f"rank {rank}: {type(cause).__name__}: {cause}") from error

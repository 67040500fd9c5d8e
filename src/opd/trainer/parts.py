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

    try:
        save(
            {name: _with_a_side(tensor) for name, tensor in tensors.items()},
            storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
        )
    except CheckpointException as error:
        if dist.get_rank() == 0:
            _raise(error)


def is_divided_checkpoint(path: Path) -> bool:
    """True for a checkpoint that `write_parts` wrote."""
    return (path / FOLDER).is_dir()


class SavedParts:
    """A checkpoint that `write_parts` wrote, to be read by each rank for itself.

    All methods raise RunFolderError for one of another model, or that lacks a file, and an exception of `checkpoint.DAMAGED` for a file that
    was cut short.
    """

    def __init__(self, path: Path) -> None:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        self.path = path
        reader = HuggingFaceStorageReader(str(path / FOLDER))
        self._entries: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)

    def named(self, beginning: str, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors whose names begin so, which have to be those of `like`, by their own names."""
        here = {f"{beginning}{name}": tensor for name, tensor in like.items()}
        if other := sorted(name for name in self._entries if name.startswith(beginning) and name not in here):
            raise RunFolderError(
                f"Checkpoint '{self.path}' is of another model: it has {other[0]}, which this one does not train."
            )
        return {name.removeprefix(beginning): value for name, value in self._read(here).items()}

    def optimizers(self, optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
        """The state of every optimizer, divided as its parameters are here."""
        return [self._optimizer(f"{OPTIMIZER}{number}/", one) for number, one in enumerate(optimizers)]

    def _optimizer(self, beginning: str, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        names = [name.removeprefix(beginning) for name in self._entries if name.startswith(beginning)]
        like: dict[str, torch.Tensor] = {}
        for name in names:
            place, _, moment = name.partition("/")
            known = moment != STEP and int(place) < len(parameters)
            like[name] = parameters[int(place)] if known else torch.zeros(())
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in self.named(beginning, like).items():
            place, _, moment = name.partition("/")
            state.setdefault(int(place), {})[moment] = value
        return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}

    def _read(self, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of these names, each with the device, dtype and division of `like`'s."""
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        found = {name: torch.zeros_like(_with_a_side(tensor)) for name, tensor in like.items()}
        self._check_whole(found)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each rank reads for itself
                load(found, storage_reader=HuggingFaceStorageReader(str(self.path / FOLDER)), no_dist=True)
        except CheckpointException as error:
            _raise(error)
        return {name: found[name] if tensor.dim() else found[name].reshape(()) for name, tensor in like.items()}

    def _check_whole(self, wanted: Mapping[str, torch.Tensor]) -> None:
        """A part that is missing would be read as zeros."""
        for name, tensor in wanted.items():
            saved = self._entries.get(name)
            if saved is None or saved.size != tensor.shape:
                raise RunFolderError(
                    f"Checkpoint '{self.path}' is of another model, or a file of its '{FOLDER}' is missing: {name} is "
                    f"{'not there' if saved is None else f'{tuple(saved.size)} there'} and {tuple(tensor.shape)} here."
                )
            there = sum(chunk.sizes.numel() for chunk in saved.chunks)
            if there != tensor.numel():
                raise RunFolderError(
                    f"Checkpoint '{self.path}' lacks a file of its '{FOLDER}': a part of {name} is not there."
                )


def _with_a_side(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, and a number as a vector of one entry: the format has no place for a tensor without sides."""
    return tensor.detach() if tensor.dim() else tensor.detach().reshape(1)


def _raise(error: CheckpointException) -> NoReturn:
    """Raise what failed on the first rank that failed: a CheckpointException is no Exception, and holds those of all ranks."""
    rank, (cause, _trace) = next(iter(error.failures.items()))
    if isinstance(cause, Exception):
        raise cause
    raise RuntimeError(f"rank {rank}: {type(cause).__name__}: {cause}") from error

"""The student's weights on their way to an engine: merged where they have adapters, under the names of its checkpoint, and a folder
that a server reads them from."""

from __future__ import annotations

import copy
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from opd.errors import ServerError
from opd.models import base_model, is_adapted

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PREFIX, LOCK = "opd-vllm-", ".in-use"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank takes."""
PER_MODULE = ("rank_pattern", "alpha_pattern", "target_parameters", "trainable_token_indices", "layer_replication")
"""Settings of an adapter that vLLM may read otherwise, or not at all."""
MEMORY = Path("/dev/shm")
ROOM = 1.05  # config and tokenizer beside the weights


def adapter_rank(model: PreTrainedModel) -> int | None:
    """The rank that vLLM has to make room for, where it can apply the model's adapters itself; None where they have to be merged.

    It applies plain LoRA beside linear layers that are not the output layer. Of a quantised base it would load other numbers than the
    trainer has; the caller merges there.
    """
    if not is_adapted(model):
        return None
    base = base_model(model)
    adapters: Any = model.peft_config
    config = adapters.get("default")
    plain = (
        len(adapters) == 1
        and getattr(config, "peft_type", None) == "LORA"
        and config.bias == "none"
        and not any(getattr(config, name, None) for name in ("use_dora", "modules_to_save", *PER_MODULE))
    )
    if not plain:
        return None
    adapted = [module for module in base.modules() if hasattr(module, "base_layer")]
    head = base.get_output_embeddings()
    if any(module is head or not isinstance(module.base_layer, torch.nn.Linear) for module in adapted):
        return None
    return next((rank for rank in VLLM_RANKS if rank >= config.r), None)


@torch.no_grad()
def merged_state(model: PreTrainedModel, *, adapted: bool = True) -> dict[str, Tensor]:
    """All weights by name, with adapters added to what they adapt, or without (`adapted`); the model itself stays as it is, bit for bit."""
    base = base_model(model)
    if not is_adapted(model):
        return dict(base.state_dict())
    merged = {}
    for name, module in base.named_modules() if adapted else ():
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer"):
            layer: Any = module
            weight = layer.base_layer.weight
            for adapter in layer.active_adapters:
                weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
            merged[f"{name}.weight"] = weight
    state = {}
    for name, value in base.state_dict().items():
        plain = name.replace(".base_layer.", ".")
        if ".lora_" not in name:
            state[plain] = merged.get(plain, value)
    return state


def has_tied_head(model: PreTrainedModel) -> bool:
    """The output layer is the embedding's matrix."""
    base = base_model(model)
    head = base.get_output_embeddings()
    return head is not None and head.weight is base.get_input_embeddings().weight


def named_weights(
    model: PreTrainedModel, *, untied: bool = False, adapted: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Every weight once, under the names of a checkpoint on disk (experts that are one tensor in memory are several there). `untied`
    gives a tied output layer a name of its own; without `adapted` the weights are those beside the adapters."""
    from transformers.core_model_loading import revert_weight_conversion

    base = base_model(model)
    tied: Any = getattr(base, "all_tied_weights_keys", None) or {}
    state = merged_state(model, adapted=adapted)
    named = dict(revert_weight_conversion(base, {name: value for name, value in state.items() if name not in tied}))
    if untied and has_tied_head(model):
        head = next(name for name, module in base.named_modules() if module is base.get_output_embeddings())
        named[f"{head}.weight"] = state[f"{head}.weight"]
    yield from named.items()


class SyncFolder:
    """Folders of weights, one per version: the new one beside the last, which goes when the server has read the new one."""

    def __init__(self, place: str | None, files: Mapping[str, bytes], *, untied: bool = False) -> None:
        """`place` is the recipe's rollout.vllm.sync_dir; `files` are the student's tokenizer files. `untied` makes a tied output layer
        a matrix of its own: on a CPU, vLLM packs that layer when it starts, and gives it no new weights where it has none by name."""
        self.untied = untied
        self.place = place
        self.files = files
        self.root: Path | None = None
        self._lock: int | None = None
        self.current: Path | None = None
        """What the server has read last."""
        self.base: Path | None = None

    def write(self, model: PreTrainedModel, version: int) -> Path:
        """A folder of these weights, adapters merged. Raises ServerError where there is no room for it."""
        size = sum(p.numel() * p.element_size() for p in base_model(model).parameters())
        return self._written(f"step-{version}-", size, lambda folder: self._save(model, folder))

    def write_base(self, model: PreTrainedModel) -> Path:
        """The folder of the weights beside the adapters, which stays until `remove`. Raises ServerError as `write` does."""
        if self.base is None:
            size = sum(p.numel() * p.element_size() for p in base_model(model).parameters())
            self.base = self._written("base-", size, lambda folder: self._save(model, folder, adapted=False))
        return self.base

    def write_adapter(self, model: PreTrainedModel, version: int) -> Path:
        """A folder of the adapters alone, as peft writes them. Raises ServerError as `write` does."""
        size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        return self._written(f"adapter-{version}-", size, model.save_pretrained)

    def _written(self, prefix: str, size: int, save: Callable[[Path], object]) -> Path:
        root = self._root(size)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
        free = shutil.disk_usage(root).free
        try:
            if free < ROOM * size:
                raise OSError(f"{size / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free")
            folder.chmod(0o755)
            save(folder)
        except (OSError, SafetensorError) as error:  # the second is how safetensors reports a full disk
            shutil.rmtree(folder, ignore_errors=True)
            raise ServerError(
                f"The weights for vLLM cannot be written to {root}: {error}. Free some space there, or set rollout.vllm.sync_dir to a folder "
                "with room for two copies of the student; then go on with --resume."
            ) from error
        return folder

    def _save(self, model: PreTrainedModel, folder: Path, *, adapted: bool = True) -> None:
        base = base_model(model)
        config = copy.deepcopy(base.config)
        config.architectures = [type(base).__name__]
        if self.untied:
            config.tie_word_embeddings = False
        config.save_pretrained(folder)
        weights = {
            name: value.detach().cpu() for name, value in named_weights(model, untied=self.untied, adapted=adapted)
        }
        # Each with memory of its own: safetensors refuses parts of a common one.
        save_file(
            {name: value.clone() for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"}
        )
        for name, content in self.files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)

    def settle(self, folder: Path) -> None:
        """The server has read this folder; the one before it goes."""
        if self.current is not None and self.current != folder:
            shutil.rmtree(self.current, ignore_errors=True)
        self.current = folder

    def remove(self) -> None:
        """Delete everything that was written."""
        if self.root is not None:
            shutil.rmtree(self.root, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
        self.root = self.current = self.base = self._lock = None

    def _root(self, size: int) -> Path:
        if self.root is None:
            base = Path(self.place) if self.place is not None else _roomiest(size)
            try:
                base.mkdir(parents=True, exist_ok=True)
                _remove_orphans(base)
                self.root = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
                self._lock = locked(self.root / LOCK, os.O_RDWR | os.O_CREAT)
                if self.place is not None:
                    self.root.chmod(0o755)  # a server that another user started reads it too
            except OSError as error:
                raise ServerError(
                    f"No folder for vLLM's weights can be made in {base}: {error.strerror or error}. Set rollout.vllm.sync_dir to one that you "
                    "may write to."
                ) from error
        return self.root


def _remove_orphans(base: Path) -> None:
    """Delete what runs left that were killed: weights in memory would stay there until the machine starts anew."""
    for folder in base.glob(f"{PREFIX}*"):
        lock = None
        with suppress(OSError):  # no folder of ours, or one of another user's
            lock = locked(folder / LOCK, os.O_RDWR)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def locked(path: Path, flags: int, mode: int = 0o600) -> int | None:
    """A descriptor that holds the lock of this file; None where another process holds it. Raises OSError where it cannot be opened."""
    lock = os.open(path, flags, mode)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def _roomiest(size: int) -> Path:
    """Memory where two copies fit into half of what is free there, the disk otherwise."""
    in_memory = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 4 * size
    return MEMORY if in_memory else Path(tempfile.gettempdir())

"""Models whose weights are divided over the ranks, by PyTorch's fully_shard: each rank keeps its part of every layer.

fully_shard takes seconds to import, so that other modules import this one where they need it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opd.doctor.device_memory import device_memory
from opd.errors import ModelError
from opd.ranks import WAIT, Ranks
from opd.trainer.lockstep import Lockstep
from opd.trainer.whole import local, whole_tensor

T = TypeVar("T")
ROOM = 0.5  # of the free memory: the rest is for keys, values and distributions
GIB = 1 << 30
STUDENT = "student"
"""Name of the task that gathers the whole student."""


class Division:
    """A model that is divided. Its layers are gathered one by one as it runs; what lies outside of them, the output layer above all, is
    gathered by the first run and stays until `close`, so that a step of the fused loss gathers it once."""

    def __init__(self, model: PreTrainedModel, lockstep: Lockstep, mesh: DeviceMesh) -> None:
        """Every rank divides the same model, which is whole and moves to the device of the mesh. Raises ModelError for one without
        layers that could be told apart."""
        layers = decoder_layers(model)
        if not layers:
            raise ModelError(
                f"train.parallel=fsdp2 divides the decoder layers of a model, and {type(model).__name__} names none "
                "(_no_split_modules is empty). Set train.parallel=ddp."
            )
        self.model: Any = model
        self.lockstep = lockstep
        self.ranks = lockstep.ranks
        self.whole_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self._blank = _blank(model) if self.ranks.first else None
        self._fully_shard(layers, mesh)
        self.place = lockstep.add(model)
        lockstep.run_along(self.place)  # fully_shard prepares itself at the first run
        self.gathers_for_sampling = self.whole_bytes <= ROOM * min(self.ranks.gather(_free(mesh.device_type)))
        """All weights have room on every rank while it samples; otherwise they are gathered layer by layer for every token."""

    def _fully_shard(self, layers: Sequence[nn.Module], mesh: DeviceMesh) -> None:
        options: Any = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
        for layer in layers:
            fully_shard(layer, reshard_after_forward=True, **options)
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if head is not None and embedding.weight is not head.weight:
            fully_shard(embedding, reshard_after_forward=True, **options)
        fully_shard(self.model, reshard_after_forward=False, **options)
        for module in self.parts:
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the tokens of all ranks already
            module.set_force_sum_reduction_for_comms(True)
        self.model.set_reduce_scatter_unused_params(True)
        self.model.set_reshard_after_backward(False, recurse=False)

    @property
    def parts(self) -> list[Any]:
        """The modules whose weights are gathered together, the model itself first."""
        return [module for module in self.model.modules() if isinstance(module, FSDPModule)]

    @property
    def own_bytes(self) -> int:
        """Bytes of weights that this rank keeps."""
        return sum(local(p).numel() * p.element_size() for p in self.model.parameters())

    def close(self) -> None:
        """Give back what was gathered: the model's parameters are this rank's parts again. Alone on each rank."""
        self.model.reset_iter_state()

    def sampling(self) -> AbstractContextManager[None]:
        """Entered around sampling by all ranks."""
        return self.gathered() if self.gathers_for_sampling else nullcontext()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, every rank has the whole model and runs it as often as it likes. Every rank has to come here."""
        self.ranks.gather(None)  # nobody runs anything any more
        layers = self.parts
        for module in layers:
            module.set_reshard_after_forward(False, recurse=False)
            with self.lockstep.collective():
                module.unshard()
        try:
            with self.lockstep.free(self.place):
                yield
        finally:
            self.close()
            for module in layers[1:]:
                module.set_reshard_after_forward(True, recurse=False)

    def turns(self, items: Sequence[T]) -> Iterator[T | None]:
        """The items, and None as often as another rank has more of them. Between two turns the gradients of the layers are summed over
        the ranks; those of the rest are after the last."""
        most = max(self.ranks.gather(len(items)))
        self.close()
        for place in range(most):
            item = items[place] if place < len(items) else None
            self.ranks.gather(None)  # an item may have been made by a teacher
            self.model.set_requires_gradient_sync(place == most - 1, recurse=False)
            with self.lockstep.in_step():
                yield item

    def backward(self, loss: torch.Tensor) -> None:
        """Add to the gradients, on all ranks at once. An error of another rank's loss is raised here."""
        self.ranks.gather(None)
        with self.lockstep.collective():
            loss.backward()

    def whole(self) -> PreTrainedModel | None:
        """On rank 0 an undivided copy of the model in main memory, as it was before; None on the others. Every rank has to ask."""
        self.close()
        values = {name: whole_tensor(p, self.ranks) for name, p in self.model.named_parameters()}
        if self._blank is None:
            return None
        filled = copy.deepcopy(self._blank)
        by_id = {
            id(p): nn.Parameter(values[name], requires_grad=p.requires_grad)  # pyright: ignore[reportArgumentType]  # rank 0 has them
            for name, p in filled.named_parameters()
        }
        for module in filled.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = by_id[id(parameter)]
        return filled


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that transformers names as those that must not be split; by name, in order."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        one = isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in names
        if one and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = module
    return list(found.values())


def _blank(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its weights, which take no memory; its buffers are there."""
    emptied = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, emptied)


def _free(device_type: str) -> int:
    """Bytes that are free on this rank's device; of main memory, a rank's share is."""
    if device_type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return device_memory(()).get("cpu", 0) // dist.get_world_size()


@cache
def _mesh(device_type: str) -> DeviceMesh:
    """All ranks, over connections of their own: a rank that fails says so over the others, whatever hangs in these."""
    group: Any = dist.new_group(backend="nccl" if device_type == "cuda" else "gloo", timeout=WAIT)
    return DeviceMesh.from_group(group, device_type)


class Divisions:
    """The divided models of a run."""

    def __init__(
        self, ranks: Ranks, device: torch.device, student: PreTrainedModel, others: Sequence[PreTrainedModel]
    ) -> None:
        """Divide whole models over `device` of each rank, whose type says over which backend they talk. Every rank has to."""
        self.ranks = ranks
        self.device = device
        mesh = _mesh(device.type)
        self._lockstep = Lockstep(ranks)
        self._found: dict[int, Division] = {}
        for model in (student, *others):
            if id(model) not in self._found:  # a teacher may be the student itself
                self._found[id(model)] = Division(model, self._lockstep, mesh)
        self.task(STUDENT, self._found[id(student)].whole)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is divided, and how rollouts are drawn from it, in a line."""
        found = list(self._found.values())
        own, whole = (sum(getattr(one, name) for one in found) / GIB for name in ("own_bytes", "whole_bytes"))
        once = found[0].gathers_for_sampling
        gathered = "once for all rollouts of a step" if once else "layer by layer for every token that a rollout draws"
        return (
            f"train.parallel=fsdp2: {self.ranks.world} ranks divide {whole:.3g} GiB of weights and keep about {own:.3g} GiB each; the student's "
            f"are gathered {gathered}",
        )

    def of(self, model: nn.Module) -> Division | None:
        """None for a model that every rank has whole."""
        return self._found.get(id(model))

    def around(self, model: nn.Module) -> Callable[[], AbstractContextManager[None]]:
        """What all ranks enter around sampling from a model."""
        division = self.of(model)
        return nullcontext if division is None else division.sampling  # pyright: ignore[reportReturnType]

    def whole_student(self) -> PreTrainedModel:
        """The student in main memory, undivided. Rank 0 alone asks. Raises RankError where a part of it is gone."""
        return self.ranks.together(STUDENT)

    def close(self) -> None:
        """Give back what was gathered of all models."""
        for division in self._found.values():
            division.close()

    def task(self, name: str, do: Callable[..., Any]) -> None:
        """What all ranks do when rank 0 asks for it: `Ranks.together`."""
        self._lockstep.tasks[name] = do

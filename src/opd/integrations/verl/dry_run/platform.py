"""The platform `VERL_PLATFORM=cpu`: torch on the CPU under the interface that verl expects of a GPU."""

# pyright: reportMissingImports=false
from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

RANK_VARIABLES = ("RANK", "WORLD_SIZE")
"""Set by verl in a worker before it makes a process group."""


def _always(value: Any) -> Any:
    """A method that answers the same whatever it is asked."""
    return lambda _self, *_args, **_kwargs: value


_nothing = _always(None)
"""A CPU has one device, no queue behind it, no cache to free, no segments, no handles and no profiler."""


class CpuDevice(ModuleType):
    """`torch.cpu` with the names of `torch.cuda` that verl calls."""

    set_device = synchronize = empty_cache = ipc_collect = reset_peak_memory_stats = _nothing
    memory_allocated = memory_reserved = max_memory_allocated = max_memory_reserved = _always(0)  # it is not counted
    is_available, device_count, get_device_name = _always(True), _always(1), _always("cpu")

    def __init__(self) -> None:
        super().__init__("torch.cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def mem_get_info(self, _device: Any = None) -> tuple[int, int]:
        """Free and total memory of the machine, bytes."""
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")

    def get_rng_state(self, _device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, _device: Any = None) -> None:
        torch.set_rng_state(state)


@PlatformRegistry.register("cpu")
class CpuPlatform(PlatformBase):
    """Tells every Ray worker that it has a GPU, because verl's pools count in GPUs; start Ray with that many pretended ones."""

    device_name = vendor_name = "cpu"
    device_module = CpuDevice()
    set_device = synchronize = set_allocator_settings = empty_cache = profiler_start = profiler_stop = cudart = _nothing
    is_available, device_count, get_device_capability = _always(True), _always(1), _always((None, None))
    is_platform_available = is_ipc_supported = _always(False)  # never found by probing: VERL_PLATFORM=cpu asks for it
    visible_devices_envvar, ray_resource_name = _always("CUDA_VISIBLE_DEVICES"), _always("GPU")

    def current_device(self) -> Any:
        """A device rather than an index, because `tensor.to(0)` would mean CUDA."""
        return torch.device("cpu")

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def communication_backend_name(self) -> str:
        """gloo. In a worker the process group is made here: verl takes a group that exists as it is, and would otherwise ask torch for
        'cpu:gloo,cpu:gloo', which torch refuses because it names the CPU twice."""
        if all(name in os.environ for name in RANK_VARIABLES) and not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                backend="cpu:gloo",
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                init_method=os.environ.get("DIST_INIT_METHOD"),
            )
        return "gloo"

    def nvtx_range(self, msg: str) -> AbstractContextManager[None]:
        return nullcontext()

    def ray_noset_envvars(self) -> list[str]:
        return []

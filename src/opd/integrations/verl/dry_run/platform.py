"""The platform `VERL_PLATFORM=cpu`: torch on the CPU under the interface that verl expects of a GPU."""

# pyright: reportMissingImports=false
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

RANK_VARIABLES = ("RANK", "WORLD_SIZE")
"""What verl sets in a worker before it makes a process group."""


class CpuDevice(ModuleType):
    """`torch.cpu` with the names of `torch.cuda` that verl calls: nothing to free, nothing to wait for, no memory of its own."""

    def __init__(self) -> None:
        super().__init__("torch.cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def set_device(self, _device: Any) -> None:
        """There is one CPU."""

    def synchronize(self, _device: Any = None) -> None:
        """The CPU runs nothing behind our back."""

    def empty_cache(self) -> None:
        """The allocator of the CPU keeps no cache."""

    def ipc_collect(self) -> None:
        """There are no handles to collect."""

    def reset_peak_memory_stats(self, _device: Any = None) -> None:
        """Peaks are not counted."""

    def memory_allocated(self, _device: Any = None) -> int:
        return 0

    memory_reserved = max_memory_allocated = max_memory_reserved = memory_allocated

    def mem_get_info(self, _device: Any = None) -> tuple[int, int]:
        """Bytes free and in all, of the machine."""
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")

    def get_device_name(self, _device: Any = None) -> str:
        return "cpu"

    def get_rng_state(self, _device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, _device: Any = None) -> None:
        torch.set_rng_state(state)


@PlatformRegistry.register("cpu")
class CpuPlatform(PlatformBase):
    """Every Ray worker is told that it has a GPU, because verl's pools count in GPUs; start Ray with that many pretended ones."""

    _device = CpuDevice()

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> ModuleType:
        return self._device

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        """Never found by probing: VERL_PLATFORM=cpu asks for it by name."""
        return False

    def current_device(self) -> Any:
        """A device rather than an index, because `tensor.to(0)` would mean CUDA."""
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        """There is one CPU."""

    def synchronize(self, device_index: int | None = None) -> None:
        """The CPU runs nothing behind our back."""

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """The allocator of the CPU has no segments."""

    def empty_cache(self) -> None:
        """The allocator of the CPU keeps no cache."""

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        """gloo. In a worker the process group is made here, because verl would go on to ask torch for
        'cpu:gloo,cpu:gloo', which torch refuses: it names the CPU twice. verl takes a group that exists as it is."""
        if all(name in os.environ for name in RANK_VARIABLES) and not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                backend="cpu:gloo",
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                init_method=os.environ.get("DIST_INIT_METHOD"),
            )
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        with nullcontext():
            yield

    def profiler_start(self) -> None:
        """No device profiler."""

    def profiler_stop(self) -> None:
        """No device profiler."""

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None

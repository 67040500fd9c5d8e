"""Checks of the machine: what is installed, the devices and their free memory, and the disk."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers

from opd.config import Config
from opd.doctor.check import Check, Number

GIB = 1 << 30
LITTLE_DISK = (
    1 * GIB
)  # a run folder without any checkpoint; those of a model in float32 take 4 bytes a parameter, and thrice for AdamW
QUANTIZATION_PACKAGES = {
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "compressed-tensors": "compressed_tensors",
}


def check_machine(config: Config | None = None) -> list[Check]:
    """Python and torch, devices, disk, and the packages that the recipe needs; without a recipe, those of the machine alone."""
    checks = [_versions(), _devices(config), _disk("." if config is None else config.run_dir)]
    return checks if config is None else [*checks, _packages(config)]


def _versions() -> Check:
    attention = ["eager", "sdpa", *(["flash_attention_2"] if importlib.util.find_spec("flash_attn") else [])]
    numbers: dict[str, Number] = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "attention": " ".join(attention),
    }
    return Check(name="machine", verdict="green", seen="The versions were read.", numbers=numbers)


def _devices(config: Config | None) -> Check:
    numbers: dict[str, Number] = {"CUDA": torch.version.cuda or "not in this torch"}
    count = torch.cuda.device_count()
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        numbers[f"cuda:{index}"] = (
            f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, "
            f"bfloat16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}"
        )
    if count == 0:
        numbers["devices"] = f"CPU with {torch.get_num_threads()} threads"
    asked = _asked_devices(config)
    missing = [name for name, device in asked.items() if _absent(device, count)]
    if missing:
        key = missing[0]
        return Check(
            name="devices",
            verdict="red",
            seen=f"{key}.device={asked[key]} is not on this machine, which has {count} CUDA devices.",
            numbers=numbers,
            why="The model could not be loaded.",
            mend=f"{key}.device: auto",
        )
    return Check(name="devices", verdict="green", seen=f"The machine has {count} CUDA devices.", numbers=numbers)


def _asked_devices(config: Config | None) -> Mapping[str, str]:
    """The devices that a recipe names, by section."""
    if config is None:
        return {}
    return {role: one.device for role, one in config.all_models.items()}


def _absent(device: str, count: int) -> bool:
    if not device.startswith("cuda"):
        return False
    index = device.partition(":")[2]
    return count <= (int(index) if index.isdecimal() else 0)


def _disk(folder: str) -> Check:
    place = Path(folder).resolve()
    while not place.exists():  # a run makes its folder
        place = place.parent
    free = shutil.disk_usage(place).free
    numbers: dict[str, Number] = {"free GiB": free / GIB}
    if free >= LITTLE_DISK:
        return Check(name="disk", verdict="green", seen=f"There is room at '{place}'.", numbers=numbers)
    return Check(
        name="disk",
        verdict="yellow",
        seen=f"The disk of '{place}' has {free / GIB:.2f} GiB free.",
        numbers=numbers,
        why="Checkpoints hold the student and the state of its optimizer, and a full disk ends a run.",
        mend="run_dir: a folder on another disk",
    )


def needed_packages(config: Config) -> dict[str, tuple[str, str]]:
    """What the recipe needs beyond opd's own dependencies: module → the key that needs it, and how it is installed."""
    needed: dict[str, tuple[str, str]] = {}
    if config.student.lora is not None:
        needed["peft"] = ("student.lora", "pip install 'opd[peft]'")
    if config.log.tensorboard:
        needed["tensorboard"] = ("log.tensorboard", "pip install 'opd[tensorboard]'")
    if config.log.wandb_project is not None:
        needed["wandb"] = ("log.wandb_project", "pip install 'opd[wandb]'")
    if config.log.trackio_project is not None:
        needed["trackio"] = ("log.trackio_project", "pip install 'opd[trackio]'")
    if config.rollout.engine == "vllm" and config.rollout.vllm.mode == "colocate":
        needed["vllm"] = ("rollout.engine=vllm", "pip install vllm")
    for key, section in {"student": config.student, **config.all_teachers}.items():
        method = section.load_options.quantization or ""
        for prefix, module in QUANTIZATION_PACKAGES.items():
            if method.startswith(prefix):
                needed[module] = (f"{key}.load_options.quantization={method}", f"pip install {prefix}")
        if section.attn_implementation == "flash_attention_2":
            needed["flash_attn"] = (f"{key}.attn_implementation=flash_attention_2", "pip install flash-attn")
    return needed


def _packages(config: Config) -> Check:
    needed = needed_packages(config)
    missing = [module for module in needed if importlib.util.find_spec(module) is None]
    numbers: dict[str, Number] = {"needed": " ".join(needed) or "none"}
    if not missing:
        return Check(
            name="packages", verdict="green", seen="All packages that the recipe needs are there.", numbers=numbers
        )
    key, command = needed[missing[0]]
    return Check(
        name="packages",
        verdict="red",
        seen=f"{key} needs {missing[0]}, which is not installed.",
        numbers=numbers | {"missing": " ".join(missing)},
        why="The run would stop where it first needs the package.",
        mend=command,
    )

"""What the memory estimate means on given devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd.config.run import RunSettings
from opd.doctor.check import Check
from opd.doctor.memory import STEP, Memory, estimate, largest_microbatch, microbatch_tokens, student_device
from opd.doctor.model_shape import ModelShape
from opd.doctor.parallel import choose_parallel, ranks_line

ERROR = 0.15  # of the estimate, on CPU runs (benchmarks/results/memory.md)
GIB = 1 << 30
NAMED = 4  # parts of the peak in one line


def memory_checks(
    settings: RunSettings,
    shapes: Mapping[str, ModelShape],
    prompt_tokens: int,
    limits: Mapping[str, int],
    *,
    ranks: int = 1,
) -> list[Check]:
    """One check for each device: red where the estimate is above the device's memory (bytes) by more than its error, yellow where it
    is within its error of it. `prompt_tokens` are those of the longest prompt. Of several `ranks`
    each has a GPU like the first, or its share of main memory."""
    gpus = sum(name.startswith("cuda") for name in limits)
    divided = ranks > 1 and choose_parallel(settings, shapes, prompt_tokens, limits, ranks).parallel == "fsdp2"
    if "cpu" in limits:
        limits = {**limits, "cpu": limits["cpu"] // ranks}
    shared: Any = {"gpus": gpus, "ranks": ranks, "divided": divided}
    found = estimate(settings, shapes, prompt_tokens, **shared)
    largest = largest_microbatch(settings, shapes, prompt_tokens, limits, **shared)
    taken = microbatch_tokens(settings, shapes["student"], gpu=student_device(settings, gpus) != "cpu")
    checks = [_check(settings, device, memory, limits.get(device), largest, taken) for device, memory in found.items()]
    several = ranks_line(settings, shapes, prompt_tokens, limits) if ranks == 1 else None
    return checks if several is None else [*checks, Check(name="memory", verdict="green", seen=several)]


def _check(
    settings: RunSettings, device: str, memory: Memory, limit: int | None, largest: int | None, taken: int
) -> Check:
    parts = {**memory.always, **memory.phases.get(memory.phase, {})}
    most = sorted(parts.items(), key=lambda part: -part[1])[:NAMED]
    text = f"{device} needs about {_gib(memory.peak)}"
    text += f" in the {memory.phase}" if memory.phase else ""
    text += f" ({', '.join(f'{name} {_gib(size)}' for name, size in most)})"
    if limit is None:
        return Check(name="memory", verdict="green", seen=f"{text}; how much there is cannot be told here")
    text += f" of {_gib(limit)}"
    if memory.peak < (1 - ERROR) * limit:
        return Check(name="memory", verdict="green", seen=text)
    verdict = "red" if memory.peak > (1 + ERROR) * limit else "yellow"
    return Check(
        name="memory",
        verdict=verdict,
        seen=f"{text}. {_advice(settings, device, memory.phase, largest, taken)}",
        why="A run that does not fit ends in its first step, or its second.",
        mend="train.tokens_per_microbatch, or a key that the estimate names",
    )


def _advice(settings: RunSettings, device: str, phase: str, largest: int | None, taken: int) -> str:
    if phase == STEP:
        return "Weights, gradients and moments alone fill it; use student.lora.rank=32 or a smaller student."
    others = ", ".join(_others(settings, device)) + " or smaller models"
    if phase == "rollout":
        return f"Lower rollout.batch_size={settings.rollout.batch_size}, or use {others}."
    if largest is None:
        return f"No train.tokens_per_microbatch is small enough; use {others}."
    if largest < taken:
        return f"The largest train.tokens_per_microbatch that fits is {largest}; or use {others}."
    return f"It is close; a smaller train.tokens_per_microbatch leaves room, or use {others}."


def _others(settings: RunSettings, device: str) -> list[str]:
    """Keys that need less memory and are not set yet."""
    student, train = settings.student, settings.train
    offloads = device != "cpu"  # from there
    moments = settings.optimizer.name != "natural_gradient" and not settings.optimizer.offload
    local = [one for one in settings.all_teachers.values() if one.source == "model" and not one.url and not one.offload]
    found = {
        "student.gradient_checkpointing=true": not student.gradient_checkpointing
        and settings.optimizer.name != "natural_gradient",
        "train.autocast=bfloat16": train.autocast != "bfloat16",
        "student.lora.rank=32": student.lora is None,
        "optimizer.offload=true": offloads and moments,
        "teacher.offload=true": offloads and bool(local) and train.parallel != "fsdp2",
    }
    return [key for key, helps in found.items() if helps] or ["fewer prompts at a time"]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"

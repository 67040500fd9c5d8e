"""Rules about recipes that several ranks train on together. Imports no torch."""

from __future__ import annotations

from opd.config.run import RunSettings
from opd.errors import ConfigError

ONE_DEVICE = ("auto", "cpu", "cuda")
"""Devices of a recipe that every rank can read as its own."""


def check_ranks(settings: RunSettings, world: int) -> None:
    """Raise ConfigError where `world` ranks cannot train on this recipe together."""
    if world == 1:
        return
    train, rollout = settings.train, settings.rollout
    samples = train.prompts_per_step * train.samples_per_prompt
    _refuse(
        world > samples,
        f"{world} ranks are more than the {samples} samples of a step (train.prompts_per_step × train.samples_per_prompt), so some would have "
        f"nothing to do. Start {samples} or fewer, or raise train.prompts_per_step",
    )
    _refuse(
        rollout.engine == "vllm",
        "rollout.engine=vllm serves one training process, and every rank would start or load a server of its own. Set rollout.engine=hf, or "
        "train with one process",
    )
    if train.parallel == "fsdp2":
        check_divided(settings)
    sections = {"student": settings.student, **_teachers(settings)}
    for name, section in sections.items():
        device = str(getattr(section, "device", "auto"))
        _refuse(
            device not in ONE_DEVICE,
            f"{name}.device={device} names one device, and with {world} ranks each has its own. Set {name}.device=auto",
        )
        _refuse(
            getattr(section, "cache", None) is not None,
            f"{name}.cache counts what it keeps in one process. Drop it, or train with one process",
        )


def check_divided(settings: RunSettings) -> None:
    """Raise ConfigError where the weights of this recipe cannot be divided over ranks."""
    _refuse(
        settings.optimizer.name == "muon",
        "optimizer.name=muon orthogonalises whole matrices, and with train.parallel=fsdp2 every rank has some rows of each. Set "
        "optimizer.name=adamw, or train.parallel=ddp",
    )
    _refuse(
        settings.optimizer.name == "natural_gradient",
        "optimizer.name=natural_gradient goes back through whole layers dozens of times a step, and with train.parallel=fsdp2 every rank has "
        "a part of each. Set optimizer.name=adamw, or train.parallel=ddp",
    )
    _refuse(
        settings.student.dtype == "float16",
        "student.dtype=float16 scales the loss by the tokens of one rank, and with train.parallel=fsdp2 gradients are summed before that "
        "is undone. Set student.dtype=bfloat16, or train.parallel=ddp",
    )
    for name, section in {"student": settings.student, **_teachers(settings)}.items():
        _refuse(
            bool(getattr(section, "load_options", None)),
            f"{name}.load_options packs weights in a form that train.parallel=fsdp2 cannot divide. Drop it, or set train.parallel=ddp",
        )
        _refuse(
            bool(getattr(section, "offload", False)),
            f"{name}.offload moves whole weights, and with train.parallel=fsdp2 every rank keeps a part of them. Drop it, or set "
            "train.parallel=ddp",
        )
        device = str(getattr(section, "device", "auto"))
        _refuse(
            device not in ("auto", settings.student.device),
            f"{name}.device={device} is not the student's, and train.parallel=fsdp2 divides both over the same devices. Set "
            f"{name}.device=auto, or train.parallel=ddp",
        )


def _teachers(settings: RunSettings) -> dict[str, object]:
    alone = settings.teacher is not None
    return {"teacher" if alone else f"teachers.{name}": one for name, one in settings.all_teachers.items()}


def _refuse(wrong: bool, why: str) -> None:
    if wrong:
        raise ConfigError(f"{why}.")

"""Whether each of several ranks can have whole models, or the weights are to be divided over them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from opd.config.ranks import check_divided, check_ranks
from opd.config.run import RunSettings
from opd.doctor.memory import estimate, student_device
from opd.doctor.model_shape import ModelShape
from opd.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What train.parallel=auto means for a recipe on a machine."""

    parallel: str
    """'ddp' or 'fsdp2'."""
    why: str
    """A line for the log."""


def choose_parallel(
    settings: RunSettings,
    shapes: Mapping[str, ModelShape],
    prompt_tokens: int,
    limits: Mapping[str, int],
    ranks: int,
) -> Choice:
    """What the recipe says. 'auto' is 'ddp' where a rank's estimate is within the memory of its device (`limits`, bytes by device), else
    'fsdp2'. On a CPU, where ranks are for trying things out, it is 'ddp'."""
    if settings.train.parallel != "auto":
        return Choice(parallel=settings.train.parallel, why=f"train.parallel={settings.train.parallel}")
    gpus = sum(name.startswith("cuda") for name in limits)
    device = student_device(settings, gpus)
    if device == "cpu":
        return Choice(parallel="ddp", why="train.parallel=auto is ddp on a CPU")
    limit = min((size for name, size in limits.items() if name.startswith("cuda")), default=None)
    if limit is None:
        return Choice(parallel="ddp", why="train.parallel=auto is ddp: the memory of the GPUs cannot be told here")
    whole, part = estimates(settings, shapes, prompt_tokens, ranks, gpus=gpus)
    needs = _needs(whole, part, limit)
    if whole <= limit:
        return Choice(parallel="ddp", why=f"train.parallel=auto is ddp: {needs}")
    try:
        check_divided(settings)
    except ConfigError as error:
        return Choice(parallel="ddp", why=f"train.parallel=auto is ddp, though {needs}: {error}")
    return Choice(parallel="fsdp2", why=f"train.parallel=auto is fsdp2: {needs}")


def estimates(
    settings: RunSettings, shapes: Mapping[str, ModelShape], prompt_tokens: int, ranks: int, *, gpus: int
) -> tuple[int, int]:
    """Bytes that the device of each of several ranks needs, with ddp and with fsdp2."""
    device = student_device(settings, gpus)

    def peak(divided: bool) -> int:
        found = estimate(settings, shapes, prompt_tokens, gpus=gpus, ranks=ranks, divided=divided)
        return found[device].peak

    return peak(False), peak(True)


def ranks_line(
    settings: RunSettings, shapes: Mapping[str, ModelShape], prompt_tokens: int, limits: Mapping[str, int]
) -> str | None:
    """What --devices would need on this machine; None without several GPUs, and for a recipe that stays on the CPU or in one process."""
    gpus = [name for name in limits if name.startswith("cuda")]
    if len(gpus) < 2 or student_device(settings, len(gpus)) == "cpu":
        return None
    try:
        check_ranks(settings, len(gpus))
    except ConfigError:
        return None
    if settings.train.parallel == "auto":
        return f"--devices {len(gpus)}: {choose_parallel(settings, shapes, prompt_tokens, limits, len(gpus)).why}"
    both = estimates(settings, shapes, prompt_tokens, len(gpus), gpus=len(gpus))
    needs = _needs(*both, min(limits[name] for name in gpus))
    return f"--devices {len(gpus)}, train.parallel={settings.train.parallel}: {needs}"


def _needs(whole: int, part: int, limit: int) -> str:
    return f"of {_gib(limit)} a rank's GPU needs about {_gib(whole)} with ddp and {_gib(part)} with fsdp2"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"

"""A rank beside rank 0: it takes the same steps, and writes and decides nothing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from opd.config.recipe import to_dict
from opd.config.run import RunSettings
from opd.errors import ConfigError
from opd.ranks import Ranks
from opd.reporting.loading import Loading
from opd.trainer.canary import TeacherMoved
from opd.trainer.checkpoint import load_checkpoint
from opd.trainer.from_config import Given, RunComponents
from opd.trainer.launch import versions
from opd.trainer.loop import take_step
from opd.trainer.together import TakeStep, check_same


def follow(ranks: Ranks) -> NoReturn:
    """Do what rank 0 says until it ends the run, by an exception that `opd.joining.session` knows."""
    from transformers.utils.logging import set_verbosity_error

    warnings.simplefilter("ignore")  # rank 0 gives the same
    set_verbosity_error()
    config = _heard(ranks)
    components = RunComponents(config, Given(ranks=ranks), Loading(enabled="off"))
    checkpoint = _heard(ranks)
    if checkpoint is not None:
        load_checkpoint(checkpoint, components.student)
    components.draws.load(components.student)
    while True:
        order = _heard(ranks)
        if isinstance(order, TakeStep):
            _take_step(components, order)
        else:
            components.evaluate(order.who, extra=order.extra)


def _heard(ranks: Ranks) -> Any:
    return ranks.gather(None)[0]


def _take_step(components: RunComponents, order: TakeStep) -> None:
    components.scorer.drop_also(order.dropping)
    try:
        take_step(components, order.step)
    except TeacherMoved:  # on every rank, before the update; rank 0 ends the run
        return
    components.draws.load(components.student)


def check_together(settings: RunSettings, ranks: Ranks) -> None:
    """Raise ConfigError, on every rank, for other recipes or packages on one of them, and for fewer GPUs than ranks."""
    own = {**_flat(to_dict(settings)), **{f"the package {name}": value for name, value in versions().items()}}
    check_same(ranks, own, "Ranks that train together were started with other recipes or packages")
    gpus = torch.cuda.device_count()
    if settings.student.device != "cpu" and 0 < gpus < ranks.world:
        raise ConfigError(
            f"{ranks.world} ranks need a GPU each, and this machine shows {gpus}. Start {gpus}, or train on the CPU with "
            "student.device=cpu and teacher.device=cpu."
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found

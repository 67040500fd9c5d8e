"""The `verl.plugins` entry point, which `import verl` loads in every process: keep it light.

Engines and config classes need no registration here: `+opd=default` names them as Hydra targets, and they register themselves
when verl resolves the target. A platform, though, must be known before anything else of verl asks for the device, and a policy loss
or a trainer before somebody asks verl's registry for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

PLATFORM_VARIABLE = "VERL_PLATFORM"
LOSS_MODE = "on_policy_distillation"
REGISTRY = "verl.trainer.ppo.core_algos"
"""verl's module that holds the registry of policy losses."""
TRAINERS = "verl.trainer.ppo.v1"
"""verl's package of trainers, whose registry is filled once it is imported."""

if os.environ.get(PLATFORM_VARIABLE, "").strip().lower() == "cpu":
    import opd.integrations.verl.dry_run.platform  # noqa: F401  # registers itself


def policy_loss(*args: Any, **kwargs: Any) -> Any:
    """`compute_on_policy_distillation_loss`, whose kernels are loaded at the first call."""
    from opd.integrations.verl.plugin.on_policy_distillation import compute_on_policy_distillation_loss

    return compute_on_policy_distillation_loss(*args, **kwargs)


def register_policy_loss(registry: ModuleType) -> None:
    """Put the policy loss into verl's registry."""
    register = getattr(registry, "register_policy_loss", None)  # verl must load, whatever became of its registry
    if register is not None:
        register(LOSS_MODE)(policy_loss)


def register_trainers(_package: ModuleType) -> None:
    """Put the trainers that look at opd.guard beside verl's."""
    with suppress(
        ImportError
    ):  # verl must load, whatever became of its trainers; get_trainer_cls says that there is none
        import opd.integrations.verl.plugin.guarded_trainer  # noqa: F401  # registers itself


AFTER: dict[str, Callable[[ModuleType], None]] = {REGISTRY: register_policy_loss, TRAINERS: register_trainers}
"""What is registered after the first import of a module; to import them here would slow down every process."""


class _AfterImport(MetaPathFinder):
    """Runs the functions of AFTER, each once."""

    def __init__(self) -> None:
        self.waiting = dict(AFTER)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        register = self.waiting.pop(fullname, None)
        if register is None:
            return None
        spec = find_spec(fullname)
        loader: Any = None if spec is None else spec.loader
        if loader is None:
            return spec
        run = loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            register(module)

        loader.exec_module = run_and_register
        return spec


finder = _AfterImport()
for _name in AFTER.keys() & sys.modules.keys():
    finder.waiting.pop(_name)(sys.modules[_name])
sys.meta_path.insert(0, finder)

"""The `verl.plugins` entry point, which `import verl` loads in every process: keep it light.

Engines and config classes need no registration here: `+opd=default` names them as Hydra targets, and they register themselves
when verl resolves the target. A platform, though, must be known before anything else of verl asks for the device, and a policy loss
before somebody asks verl's registry for it.
"""

from __future__ import annotations

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

PLATFORM_VARIABLE = "VERL_PLATFORM"
LOSS_MODE = "on_policy_distillation"
REGISTRY = "verl.trainer.ppo.core_algos"
"""verl's module that holds the registry of policy losses."""

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


class _WithRegistry(MetaPathFinder):
    """Registers the policy loss when verl's registry is first imported; to import it here would slow down every process."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        loader: Any = None if spec is None else spec.loader
        if loader is None:
            return spec
        run = loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            register_policy_loss(module)

        loader.exec_module = run_and_register
        return spec


if REGISTRY in sys.modules:
    register_policy_loss(sys.modules[REGISTRY])
else:
    sys.meta_path.insert(0, _WithRegistry())

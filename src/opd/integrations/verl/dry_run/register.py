"""`actor_rollout_ref.model.external_lib` names this module on a CPU: importing it registers the rollout and the engines."""

# pyright: reportMissingImports=false
from __future__ import annotations

from verl.utils.device import get_device_name
from verl.workers.engine import EngineRegistry
from verl.workers.rollout import base
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

from opd.errors import ConfigError
from opd.integrations.verl.dry_run import ROLLOUT_NAME, attention
from opd.integrations.verl.plugin.base_engines import LanguageModelEngine, ValueModelEngine

if get_device_name() != "cpu":
    raise ConfigError(
        f"+opd_device=cpu, but verl settled on the device '{get_device_name()}'; set VERL_PLATFORM=cpu in the environment."
    )


def _replica() -> type[RolloutReplica]:
    # Late: with verl 0.8 this module is imported inside `import verl`, which the rollout's own imports may have begun.
    from opd.integrations.verl.dry_run.rollout import TransformersReplica

    return TransformersReplica


RolloutReplicaRegistry.register(ROLLOUT_NAME, _replica)
# verl has no function to register the trainer's side of a rollout; the table is what there is.
base._ROLLOUT_REGISTRY[(ROLLOUT_NAME, "async")] = "opd.integrations.verl.dry_run.rollout.WeightSender"
# verl registers its own engines for CUDA and NPU only.
EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu")(LanguageModelEngine)
EngineRegistry.register(model_type="value_model", backend="fsdp2", device="cpu")(ValueModelEngine)
attention.register()

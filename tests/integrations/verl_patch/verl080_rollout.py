"""verl 0.8 on a CPU, for tests: its rollout has no seed, which the rollout on a CPU reads."""

from __future__ import annotations

from verl.workers.config import RolloutConfig

if not hasattr(RolloutConfig, "seed"):
    RolloutConfig.seed = 0

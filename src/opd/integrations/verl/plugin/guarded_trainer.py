"""verl's trainers with the rules of opd.guard beside the metrics of each step: opd_sync, opd_colocate_async and opd_separate_async.

They are verl's own but for what happens between a step's update and verl's own save: the rules look, and one that stops saves there.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import os
from typing import Any

import numpy as np
import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from opd.integrations.verl.plugin.settings import parse
from opd.integrations.verl.plugin.step_guard import GuardStop, StepGuard, stopping, told


class GuardedTrainer(PPOTrainer):
    """The part that all of them share; it stands before verl's class in their bases."""

    mode = ""
    """verl's name, which its own code compares with."""
    guard: StepGuard | None = None
    """None in a run without opd."""
    stopped = ""
    """The reason why a rule ends the run after this step."""

    def __init__(self, config: DictConfig) -> None:
        config.trainer.v1.trainer_mode = self.mode
        section = config.get("opd")
        if section is not None:
            settings, _ = parse(OmegaConf.to_container(section, resolve=True))  # pyright: ignore[reportArgumentType]
            self.guard = StepGuard(settings.guard, settings.run_dir)
        super().__init__(config)

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, Any]) -> Any:
        """verl's step, after which the rules look at its metrics; verl saves next, or a rule does."""
        batch = super().step(metrics, timing_raw)
        if self.guard is None:
            return batch
        began = self.guard.look(self.global_steps, metrics, _mean_score(batch))
        for onset in began:
            print(told(self.global_steps, onset), flush=True)
        onset = stopping(began)
        if onset is not None and self.global_steps < self.total_training_steps:
            every = self.config.trainer.save_freq
            if every <= 0 or self.global_steps % every:
                self._save_checkpoint()
            self.stopped = (
                f"stopped after step {self.global_steps} of {self.total_training_steps} by opd.{onset.text}"
                f"{self.guard.last_values(onset.rule)} Saved in {self._checkpoint_folder()}; the same command goes on from there, with "
                "the rule's whole patience."
            )
            self.total_training_steps = self.global_steps  # verl's loop ends after this step, as after its last
        return batch

    def fit(self, agent_loop_manager: Any) -> None:
        """Train as verl does. Raises GuardStop where a rule ended it, so that verl's main ends with an error."""
        super().fit(agent_loop_manager)
        if self.stopped:
            raise GuardStop(self.stopped)

    def _save_checkpoint(self) -> None:
        if self.guard is not None:
            self.guard.save(self._checkpoint_folder())  # first, because verl's callback of a save sees a whole folder
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.guard is not None and self.global_steps > 0:
            is_named = self.config.trainer.resume_mode == "resume_path"
            self.guard.load(self.config.trainer.resume_from_path if is_named else self._checkpoint_folder())

    def _checkpoint_folder(self) -> str:
        return os.path.abspath(os.path.join(self.config.trainer.default_local_dir, f"global_step_{self.global_steps}"))


def _mean_score(batch: Any) -> float | None:
    """The mean reward of the step's responses, without those that fill up a batch."""
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["rm_scores"])
    scores = data.to_padded_tensor()["rm_scores"].sum(-1).float().cpu().numpy()
    real = np.array([not tag.get("is_padding", False) for tag in batch.tags], dtype=bool)
    return float(scores[real].mean()) if real.any() else None


@register_trainer("opd_sync")
class OpdTrainerSync(GuardedTrainer, PPOTrainerSync):
    """verl's sync."""

    mode = "sync"


@register_trainer("opd_colocate_async")
class OpdTrainerColocateAsync(GuardedTrainer, PPOTrainerColocateAsync):
    """verl's colocate_async."""

    mode = "colocate_async"


@register_trainer("opd_separate_async")
class OpdTrainerSeparateAsync(GuardedTrainer, PPOTrainerSeparateAsync):
    """verl's separate_async."""

    mode = "separate_async"

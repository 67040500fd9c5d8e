"""The rollouts of every step, drawn when they are wanted, or while the step before them updates (rollout.ahead)."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from opd.config import Config
from opd.data.prompts import PromptSchedule
from opd.errors import ServerError
from opd.samplers.base import SampledStudent, Sampler, draw
from opd.seeding import derive_seed
from opd.types import Rollout


@dataclass(frozen=True, kw_only=True)
class _Ahead:
    step: int
    rollouts: Future[list[Rollout]]


class Draws:
    """Draws the rollouts of a step, a pure function of the weights, the recipe and the step.

    With rollout.ahead=1 the next step's are drawn in a thread while this step is scored and updates: they come of weights that are
    one update older, and new weights wait until they are there.
    """

    def __init__(self, config: Config, schedule: PromptSchedule, sampler: Sampler) -> None:
        self.config = config
        self.schedule = schedule
        self.sampler = sampler
        steps = config.train.steps
        self._limits = [config.rollout.horizon(step, steps) for step in range(steps)]
        self._ahead: _Ahead | None = None
        self._threads = (
            ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts") if config.rollout.ahead else None
        )

    def take(self, step: int) -> list[Rollout]:
        """The rollouts of this step; the next step's begin to be drawn. Raises what the sampler raises."""
        ahead, self._ahead = self._ahead, None
        rollouts = ahead.rollouts.result() if ahead is not None and ahead.step == step else self._draw(step)
        if self._threads is not None and step + 1 < self.config.train.steps:
            self._ahead = _Ahead(step=step + 1, rollouts=self._threads.submit(self._draw, step + 1))
        return rollouts

    def load(self, student: SampledStudent) -> None:
        """Hand the weights to the sampler, once nothing is drawn from the ones before."""
        self._settle()
        self.sampler.load(student)

    def staleness(self, rollouts: list[Rollout], version: int) -> dict[str, float]:
        """Updates by which the student is ahead of the samples, in the mean; nothing where all are drawn as they are wanted. Raises
        ServerError for samples that are older than rollout.ahead allows."""
        limit = self.config.rollout.ahead
        behind = [version - rollout.policy_version for rollout in rollouts if rollout.source == "student"]
        if not limit or not behind:
            return {}
        if max(behind) > limit or min(behind) < 0:
            raise ServerError(
                f"Rollouts of weights that are {max(behind)} updates old came for a step that allows rollout.ahead={limit}. The step was not "
                "taken; go on with --resume."
            )
        return {"staleness": sum(behind) / len(behind)}

    def close(self) -> None:
        """Give up what is being drawn. Its engine is closed before, so that this does not take long."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        self._ahead = None

    def _settle(self) -> None:
        if self._ahead is not None:
            wait([self._ahead.rollouts])

    def _draw(self, step: int) -> list[Rollout]:
        train = self.config.train
        self.sampler.limit(self._limits[step])
        prompts = self.schedule.take(step, train.prompts_per_step)
        seed = derive_seed(self.config.seed, step, "rollout")
        return draw(self.sampler, prompts, train.samples_per_prompt, seed=seed)

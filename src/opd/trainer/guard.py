"""The rules of the section guard: read from every step's metrics, they warn, leave responses out, or end the run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from opd.config import Config
from opd.reporting.guarded import GuardAction, Onset
from opd.reporting.record import MetricsRecord
from opd.trainer.guard_advice import causes
from opd.trainer.guard_readings import OF_LENGTH, READINGS, History, Reading

DROPS = {"truncated": "truncated", "repetition": "repeating"}
"""What action=drop of a rule leaves out, in the words of train.drop."""


@dataclass
class _Standing:
    """How one rule stands."""

    broken: int = 0
    """Steps in a row."""
    kept: int = 0
    """Steps in a row since it acted."""
    acts: bool = False
    """Its patience is over, and it has not been kept for as long since."""


class Guard:
    """Takes the metrics of every step in order, and says which rules begin to be broken.

    Its state is a function of the recipe and of those metrics, so that a resumed run goes on with the same rules in force.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.rules = config.guard.rules
        self.onsets: list[Onset] = []
        """All that began so far."""
        self._history = History(config.guard.first_steps)
        self._standing = {name: _Standing() for name in self.rules}

    def look(self, step: int, metrics: Mapping[str, float], canary: Reading | None = None) -> list[Onset]:
        """The rules whose patience this step ends; `canary` is what was seen of the teachers."""
        began = self._look(step, metrics, canary)
        self.onsets += began
        return began

    def compare_with(self, teacher: Mapping[str, float]) -> None:
        """Take the evaluation of the teacher's own answers, before the first step."""
        self._history.teacher = teacher

    def before_update(self, step: int, canary: Reading) -> Onset:
        """The onset of a teacher that moved, for which this step's update is left out."""
        onset = self._onset("canary", step, canary)
        self.onsets.append(onset)
        return onset

    @property
    def dropping(self) -> frozenset[str]:
        """What the next step leaves out of its loss, in the words of train.drop."""
        acting = (name for name, rule in self.rules.items() if rule.action == "drop" and self._standing[name].acts)
        return frozenset(DROPS[name] for name in acting)

    def replay(self, records: Iterable[MetricsRecord], onsets: Sequence[Onset]) -> None:
        """Take the steps of a run that is resumed, and what began in it. Nothing is said of them again.

        A rule with action=stop that had ended the run, and one that the run knew nothing of, has its whole patience again.
        """
        records = list(records)
        for record in records:
            if record.kind == "eval" and record.who == "teacher":
                self.compare_with(record.metrics)
        steps = [record for record in records if record.kind == "step"]
        for record in steps:
            self._look(record.step, record.metrics)
        seen = steps[-1].step if steps else -1
        # A teacher that moved was seen before the step could be taken.
        self.onsets = [one for one in onsets if one.step <= seen + (one.rule == "canary")]
        told = {onset.rule for onset in self.onsets}
        for name, standing in self._standing.items():
            if standing.acts and (self.rules[name].action == "stop" or name not in told):
                self._standing[name] = _Standing()

    def _look(self, step: int, metrics: Mapping[str, float], canary: Reading | None = None) -> list[Onset]:
        rollout = self.config.rollout
        if rollout.horizon(step, self.config.train.steps) < rollout.max_new_tokens:
            metrics = {name: value for name, value in metrics.items() if name not in OF_LENGTH}
        self._history.add(metrics)
        self._history.canary = canary
        return [onset for name in self.rules if (onset := self._judge(name, step)) is not None]

    def _judge(self, name: str, step: int) -> Onset | None:
        rule, standing = self.rules[name], self._standing[name]
        reading = READINGS[name](self._history)
        if reading is None or not reading.value >= rule.threshold:
            standing.broken = 0
            standing.kept += 1
            standing.acts &= standing.kept < rule.patience
            return None
        standing.broken += 1
        standing.kept = 0
        if standing.acts or standing.broken < rule.patience:
            return None
        standing.acts = True
        return self._onset(name, step, reading)

    def _onset(self, name: str, step: int, reading: Reading) -> Onset:
        rule = self.rules[name]
        steps = "" if rule.patience == 1 else f" for {rule.patience} steps"
        facts = reading.facts
        if not facts.endswith("."):
            facts += f", and guard.{name}.threshold={rule.threshold:g} has been passed{steps}."
        action = cast("GuardAction", rule.action)
        advice = causes(reading.causes or name, 3 if action == "stop" else 1)
        if action == "drop":
            advice = f"Such responses leave the loss while this lasts. {advice}"
        return Onset(step=step, rule=name, action=action, value=reading.value, facts=facts, advice=advice)

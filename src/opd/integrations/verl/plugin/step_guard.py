"""The rules of opd.guard over the metrics that verl's driver has of each step. Needs no verl.

The rules, their readings and their patience are those of a recipe's section guard; here are verl's names of metrics and of keys.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from opd.config.guard import GuardConfig
from opd.errors import OpdError, RunFolderError
from opd.integrations.verl.plugin.recipe_keys import in_verl_words
from opd.reporting.files import strict_json, write_atomically
from opd.reporting.guarded import Onset, write_onsets
from opd.reporting.record import MetricsRecord
from opd.trainer.guard import Guard

STATE_FILE = "opd_guard.json"
"""In a checkpoint of verl's, beside its data.pt."""
OURS = "actor/opd/"
THEIRS = {"loss": "actor/loss", "clipped": "actor/pg_clipfrac"}
"""Names that the rules read, and verl's, which come before ours: `loss` of ours is the distillation's alone."""
SCORE = "reward/mean"
READS = {
    "truncated": "truncated",
    "repetition": "repetition",
    "length": "response_length",
    "eos_prob": "eos_prob",
    "entropy": "student_entropy",
    "loss": "loss",
    "reward": SCORE,
    "sampler_gap": "sampler_student_gap",
}
"""By rule, the metric whose last values a stop tells."""
WATCHED = (*READS.values(), "reverse_kl", "teacher_entropy", "clipped", "clamped_tokens", "tokens")
SHOWN_VALUES = 5


class GuardStop(OpdError):
    """A rule of opd.guard with action=stop ended the run, after a checkpoint."""


class StepGuard:
    """Takes the metrics of each step in order. `run_dir` is opd.run_dir, whose report tells what began."""

    def __init__(self, config: GuardConfig, run_dir: str | None = None) -> None:
        self.run_dir = run_dir
        self.config = config
        self.steps: list[MetricsRecord] = []
        """Of this run, and before it of the one that it goes on from."""
        self._guard = self._new_guard()

    def _new_guard(self) -> Guard:
        # A recipe's schedule of lengths, which verl has none of, would hide metrics of length.
        whole = SimpleNamespace(horizon=lambda step, steps: 1, max_new_tokens=1)
        return Guard(cast(Any, SimpleNamespace(guard=self.config, rollout=whole, train=SimpleNamespace(steps=1))))

    @property
    def onsets(self) -> list[Onset]:
        """All that began so far."""
        return self._guard.onsets

    def look(self, step: int, metrics: Mapping[str, Any], score: float | None = None) -> list[Onset]:
        """The rules whose patience this step ends, in verl's words. `step` counts from 1, as verl's does; `score` is the mean reward."""
        record = MetricsRecord(kind="step", step=step - 1, metrics=watched(metrics, score))
        self.steps.append(record)
        began = [in_verl(onset) for onset in self._guard.look(record.step, record.metrics)]
        if began:
            self._guard.onsets[-len(began) :] = began
            if self.run_dir is not None and Path(self.run_dir).is_dir():  # a folder of another machine's is rank 0's
                write_onsets(self.run_dir, self.onsets)
        return began

    def last_values(self, rule: str) -> str:
        """A sentence with what the rule read last; empty for one that reads several metrics."""
        name = READS.get(rule, "")
        values = [record.metrics[name] for record in self.steps[-SHOWN_VALUES:] if name in record.metrics]
        return f" The last values of {name}: {', '.join(f'{value:.3g}' for value in values)}." if values else ""

    def save(self, checkpoint: str | Path) -> None:
        """Write what a run needs to go on with the same rules in force. Raises RunFolderError."""
        Path(checkpoint).mkdir(parents=True, exist_ok=True)
        state = {
            "steps": [{"step": one.step, "metrics": one.metrics} for one in self.steps],
            "onsets": [asdict(one) for one in self.onsets],
        }
        write_atomically(Path(checkpoint) / STATE_FILE, json.dumps(strict_json(state)).encode())

    def load(self, checkpoint: str | Path) -> None:
        """Go on from a checkpoint; from one without the file the rules begin anew. Raises RunFolderError."""
        path = Path(checkpoint) / STATE_FILE
        if not path.exists():
            return
        try:
            state = json.loads(path.read_bytes())
            self.steps = [MetricsRecord(kind="step", **one) for one in state["steps"]]
            onsets = [Onset(**one) for one in state["onsets"]]
        except (ValueError, TypeError, KeyError) as error:
            raise RunFolderError(
                f"{path} cannot be read: {error}. Delete it, and the rules of opd.guard begin anew."
            ) from error
        self._guard = self._new_guard()
        self._guard.replay(self.steps, onsets)


def watched(metrics: Mapping[str, Any], score: float | None) -> dict[str, float]:
    """What the rules read, under a recipe's names."""
    found = {name.removeprefix(OURS): value for name, value in metrics.items() if name.startswith(OURS)}
    if "clamped" in found:  # a mean over tokens here
        found |= {"clamped_tokens": found["clamped"], "tokens": 1.0}
    found |= {name: metrics[theirs] for name, theirs in THEIRS.items() if theirs in metrics}
    if score is not None:
        found[SCORE] = score
    return {name: float(found[name]) for name in WATCHED if name in found and math.isfinite(found[name])}


def in_verl(onset: Onset) -> Onset:
    """The onset with the keys of verl's command line."""
    facts = re.sub(r"(?<![\w.])guard\.", "opd.guard.", onset.facts)
    return replace(onset, facts=facts, advice=in_verl_words(onset.advice))


def told(step: int, onset: Onset) -> str:
    """The line of the log about a rule that begins to act; `step` counts from 1."""
    return f"opd: warning: step {step}: opd.{onset.text}"


def stopping(onsets: Sequence[Onset]) -> Onset | None:
    """The first that ends the run."""
    return next((one for one in onsets if one.action == "stop"), None)

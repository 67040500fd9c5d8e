"""Section of the rules that watch a run: each has a threshold, a patience in steps, and an action."""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any, Literal, cast

from opd.config.rules import at_least, positive
from opd.config.sections import Section


class GuardRule(Section, key="guard"):
    """A rule is broken while its number is at or above `threshold`; after `patience` such steps in a row it acts."""

    threshold: float = 1.0
    """The number from which the rule is broken."""
    patience: int = 5
    """Steps in a row with a broken rule until it acts, and with a kept one until it counts as new."""

    def __post_init__(self) -> None:
        positive(self, "threshold")
        at_least(1, self, "patience")


class WatchRule(GuardRule, key="guard"):
    """A rule that warns or ends the run."""

    action: Literal["off", "warn", "stop"] = "warn"
    """warn says it once per onset; stop saves a checkpoint, writes the report and ends the run."""


class DropRule(GuardRule, key="guard"):
    """A rule that can also leave the responses which break it out of the loss."""

    action: Literal["off", "warn", "drop", "stop"] = "warn"
    """warn says it once per onset; drop also leaves such responses out of the loss while the rule is broken, as train.drop does always;
    stop saves a checkpoint, writes the report and ends the run."""


class TruncatedRule(DropRule, key="guard.truncated"):
    """Responses that are cut off at the length limit. Not watched while rollout.horizon_start still grows."""

    threshold: float = 0.75
    """Share of a step's responses."""


class RepetitionRule(DropRule, key="guard.repetition"):
    """Responses that repeat themselves."""

    threshold: float = 0.25
    """Share of repeated 4-grams, less that of the first steps."""
    patience: int = 3
    """Steps in a row until the rule acts."""


class LengthRule(WatchRule, key="guard.length"):
    """Responses that grow or shrink, and not towards the length of the teacher's own. A student that was cut off at first and learns to
    end does not break it."""

    threshold: float = 4.0
    """Factor between the mean length and that of the first steps, in either direction; where the teacher was evaluated, also that of its
    own answers."""


class EosProbRule(WatchRule, key="guard.eos_prob"):
    """A student that unlearns to end its responses."""

    threshold: float = 10.0
    """Factor by which the mean probability of the end is below that of the first steps."""


class EntropyRule(WatchRule, key="guard.entropy"):
    """A student whose distribution collapses to single tokens, and not because the teacher's is as sharp."""

    threshold: float = 4.0
    """Factor by which the student's entropy is below both the teacher's and its own of the first steps. Where the teacher's is not known,
    the reverse KL must not have halved since."""


class LossRule(WatchRule, key="guard.loss"):
    """A loss that jumps up."""

    threshold: float = 50.0
    """Distance above the median of the last 20 steps, in robust standard deviations (1.48 median absolute deviations, and no less than a
    tenth of the median)."""
    patience: int = 2
    """Steps in a row until the rule acts; a single step's jump is mostly a strange batch."""


class RewardRule(WatchRule, key="guard.reward"):
    """A training reward that falls while the KL to the teacher falls: the student learns something else than the task."""

    threshold: float = 0.3
    """Fall of the mean of 10 steps below the best such mean, as a share of it; it must also be four standard errors."""


class ClippedRule(WatchRule, key="guard.clipped"):
    """Tokens that teach little, because their ratio is clipped, their weight is capped, or the teacher's log-prob is clamped."""

    threshold: float = 0.3
    """Share of a step's tokens, the largest of the three."""


class SamplerGapRule(WatchRule, key="guard.sampler_gap"):
    """A sampler that does not draw from the student that is trained."""

    threshold: float = 0.1
    """Mean distance of the sampler's and the trainer's log-probs (nats)."""
    patience: int = 3
    """Steps in a row until the rule acts."""


class CanaryRule(WatchRule, key="guard.canary"):
    """A teacher that is no longer what it was: weights lost in a sleep, another model behind the address, scores shifted by one. It is
    looked at every teacher.canary_every steps and after every fault of its server, between its scores and the update. A teacher that is
    the student, or its moving average, moves by design and is not watched."""

    threshold: float = 0.1
    """Mean distance (nats) of the log-probs of a fixed text from those of the start."""
    patience: int = 1
    """Looks in a row until the rule acts; after a broken one, every step is looked at."""
    action: Literal["off", "warn", "stop"] = "stop"
    """stop ends the run before an update with such scores; warn says it once per onset, and trains on."""


class StartKlRule(WatchRule, key="guard.start_kl"):
    """A student that moves far from what it was before training. Every ten steps it reads a few short answers of its first step again;
    the metric start_kl is recorded while the rule is on."""

    threshold: float = 3.0
    """KL from the student to its start (nats per token). Five healthy runs of the demo's task stayed below 1.5, and two with rates 25 and
    250 times too high reached 3.4 and 4.0 (benchmarks/LOG.md); a teacher that is further away needs a higher one."""
    patience: int = 1
    """Looks in a row until the rule acts."""
    action: Literal["off", "warn", "stop"] = "off"
    """warn says it once per onset; stop saves a checkpoint, writes the report and ends the run."""


class GuardConfig(Section, key="guard"):
    """Rules that watch the metrics of a run while it goes on."""

    first_steps: int = 5
    """Steps at the start of the run whose mean later steps are compared with."""
    truncated: TruncatedRule = field(default_factory=TruncatedRule)
    """Too many responses are cut off."""
    repetition: RepetitionRule = field(default_factory=RepetitionRule)
    """Responses repeat themselves more than at the start."""
    length: LengthRule = field(default_factory=LengthRule)
    """Responses became much longer or shorter."""
    eos_prob: EosProbRule = field(default_factory=EosProbRule)
    """The student unlearns to end."""
    entropy: EntropyRule = field(default_factory=EntropyRule)
    """The student's distribution collapses."""
    loss: LossRule = field(default_factory=LossRule)
    """The loss jumps up."""
    reward: RewardRule = field(default_factory=RewardRule)
    """The reward falls while the KL falls."""
    clipped: ClippedRule = field(default_factory=ClippedRule)
    """Too many tokens are clipped, capped or clamped."""
    sampler_gap: SamplerGapRule = field(default_factory=SamplerGapRule)
    """Sampler and trainer disagree about the same tokens."""
    canary: CanaryRule = field(default_factory=CanaryRule)
    """A teacher is no longer what it was at the start."""
    start_kl: StartKlRule = field(default_factory=StartKlRule)
    """The student is far from its start."""

    def __post_init__(self) -> None:
        at_least(1, self, "first_steps")

    @property
    def rules(self) -> dict[str, WatchRule | DropRule]:
        """Every rule that is on, by its name."""
        found = {item.name: getattr(self, item.name) for item in fields(cast(Any, self)) if item.name != "first_steps"}
        return {name: rule for name, rule in found.items() if rule.action != "off"}

"""The one table of charted metrics: panel, label, note and axis. A metric that is not in it appears under "Other metrics"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opd.reporting.record import Who

Dash = Literal["solid", "dash", "dot"]

# Colours are CSS variables of the page (assets/report.css), so that light, dark and print each have their own.
STUDENT = "student"
TEACHER = "teacher"
NEUTRAL = "neutral"
SECOND = "second"
"""Of a second quantity about the student, such as the forward KL."""
SOURCE_COLORS = {"on_policy/": STUDENT, "off_policy/": TEACHER}
PHASE_COLORS = ("phase-1", "phase-2", "phase-3", "phase-4", "phase-5")

KL_BY_POSITION_PREFIX = "kl_by_position/"
AT_THE_ENDS = "accuracy_"  # eval.extra_temperatures: measured by the first and the last evaluation alone
ENDS_NOTE = "Measured at the first and the last evaluation alone. Bars: 95% confidence."
LOSS, REVERSE_KL = "loss", "reverse_kl"
START_KL = "start_kl"  # nats per token between the student and the student before training
TOKENS = "tokens"
STEP_TIME = "time/step"
TOKENS_PER_SECOND = "time/tokens_per_second"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One metric in a panel."""

    metric: str
    label: str
    color: str = STUDENT
    dash: Dash = "solid"
    who: Who | None = None
    """None draws the training metric; otherwise the evaluation of that model, with its intervals."""
    note: str = ""
    """What the panel's note adds where this curve is drawn."""
    ends: bool = False
    """Measured at the ends of the run alone: drawn as points, which no line joins."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart."""

    title: str
    note: str
    curves: tuple[Curve, ...]
    unit: str = ""
    """Such as "nats"; empty for shares and plain numbers."""
    percent: bool = False
    log: bool = False
    """Use a logarithmic axis where the values are positive and span a wide range."""
    from_zero: bool = False
    smooth: bool = True
    """Draw a running median in front of a long run's values."""
    teacher_level: str | None = None
    """Evaluation metric whose teacher value is drawn as a level across the chart."""


@dataclass(frozen=True, kw_only=True)
class PanelGroup:
    """A section of the page."""

    title: str
    panels: tuple[Panel, ...]


def _one(
    metric: str, title: str, note: str, *, color: str = STUDENT, held_out: bool = False, unit: str = "", **options: bool
) -> Panel:
    """A panel of one metric; `held_out` adds the student's evaluation and the teacher's level."""
    curves = (Curve(metric=metric, label="training", color=color),)
    if held_out:
        curves += (Curve(metric=metric, label="held out", color=color, dash="dot", who="student"),)
    level = metric if held_out else None
    return Panel(title=title, note=note, curves=curves, teacher_level=level, unit=unit, **options)


LEARNING = PanelGroup(
    title="Learning",
    panels=(
        Panel(
            title="Held-out accuracy",
            note="Band and bars: 95% confidence.",
            curves=(
                Curve(metric="accuracy", label="student", who="student"),
                Curve(
                    metric="accuracy_greedy",
                    label="student, greedy",
                    who="student",
                    ends=True,
                    note="The diamonds are greedy answers, at the first and the last evaluation.",
                ),
            ),
            percent=True,
            teacher_level="accuracy",
        ),
        _one("reward/mean", "Reward", "Mean over the samples of the step."),
        Panel(
            title="Divergence from the teacher",
            note="Per response token, on the samples of the step. Should fall.",
            curves=(
                Curve(metric="reverse_kl", label="reverse KL"),
                Curve(metric="forward_kl", label="forward KL", color=SECOND),
                Curve(metric="reverse_kl", label="reverse KL, held out", dash="dot", who="student"),
            ),
            unit="nats",
            log=True,
        ),
        _one(LOSS, "Loss", "Per token, as the optimizer sees it.", log=True),
        Panel(
            title="Entropy",
            note="Per token. A student far below its teacher has become too sure.",
            curves=(
                Curve(metric="student_entropy", label="student"),
                Curve(metric="teacher_entropy", label="teacher", color=TEACHER),
            ),
            unit="nats",
            from_zero=True,
        ),
        _one(
            "overlap",
            "Top-k overlap",
            "Share of the 16 likeliest tokens that student and teacher agree on; fewer tokens where objective.top_k or the vocabulary is "
            "small. Should rise. Most of the 16 can be very unlikely, so a low share at a small KL is no alarm.",
            percent=True,
        ),
        _one("teacher_perplexity", "Teacher perplexity", "On the student's responses.", color=TEACHER, log=True),
        _one(START_KL, "KL to the start", "From the student to what it was before training, per token.", unit="nats"),
    ),
)

RESPONSES = PanelGroup(
    title="Responses",
    panels=(
        _one("response_length", "Response length", "Per response.", held_out=True, unit="tokens", from_zero=True),
        _one("truncated", "Truncated", "Share cut at the length limit.", held_out=True, percent=True, from_zero=True),
        _one("eos_prob", "End of sequence", "Its mean probability over the positions of a response.", percent=True),
        _one("repetition", "Repetition", "A rise means that the student has begun to loop.", from_zero=True),
    ),
)

MACHINE = PanelGroup(
    title="Optimizer and machine",
    panels=(
        _one("grad_norm", "Gradient norm", "Before clipping.", color=NEUTRAL, log=True),
        _one("lr", "Learning rate", "", color=NEUTRAL, from_zero=True, smooth=False),
        _one(
            "natural/predicted_kl",
            "Natural-gradient step",
            "Predicted KL per token.",
            color=NEUTRAL,
            unit="nats",
            log=True,
        ),
        _one("natural/residual", "Solver residual", "Relative residual of the conjugate gradients.", color=NEUTRAL),
        _one("clamped_tokens", "Clamped tokens", "Contributions that hit the clamp. Should be rare.", color=NEUTRAL),
        _one(TOKENS, "Tokens per step", "Response tokens trained on.", color=NEUTRAL, unit="tokens", from_zero=True),
        _one(
            TOKENS_PER_SECOND,
            "Throughput",
            "Response tokens per second.",
            color=NEUTRAL,
            unit="tokens/s",
            from_zero=True,
        ),
    ),
)

GROUPS = (LEARNING, RESPONSES, MACHINE)
PERCENT_METRICS = frozenset(
    curve.metric for group in GROUPS for panel in group.panels if panel.percent for curve in panel.curves
)

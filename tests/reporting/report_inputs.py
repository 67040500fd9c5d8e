"""A small run folder, as training writes it, and the samples in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd.reporting import RunRecorder, SampleRecord, write_summary

SUMMARY = {
    "student_before": {"accuracy": 0.125, "interval": [0.08, 0.19], "reverse_kl": 0.75},
    "student_after": {
        "accuracy": 0.625,
        "interval": [0.55, 0.69],
        "reverse_kl": 0.0625,
        "reverse_kl_interval": [0.05, 0.075],
        "accuracy_greedy": 0.6875,
    },
    "teacher": {"accuracy": 0.875, "interval": [0.81, 0.92]},
    "seconds": 3765.0,
}


def a_sample(
    step: int = 0, prompt: str = "2 + 2 =", tokens: Sequence[str] = (" 4", "\n"), **changes: Any
) -> SampleRecord:
    values: dict[str, Any] = {
        "step": step,
        "phase": "eval",
        "who": "student",
        "prompt": prompt,
        "answer": "4",
        "response": "".join(tokens),
        "tokens": tuple(tokens),
        "reverse_kl": tuple(0.02 for _ in tokens),
        "reward": 1.0,
        "finished": True,
        "source": "student",
    }
    return SampleRecord(**{**values, **changes})


def write_run(
    run: Path, *, steps: int = 4, evaluations: bool = True, samples: bool = True, summary: bool = True
) -> Path:
    """A run of `steps` updates, evaluated before every second one and after the last."""
    with RunRecorder(run, resume_step=None) as recorder:
        for step in range(steps + 1):
            if evaluations and step % 2 == 0:
                recorder.evaluation(step, "student", {"accuracy": step / 8}, {"accuracy": (0.0, 0.75)})
                recorder.evaluation(step, "teacher", {"accuracy": 0.875}, {"accuracy": (0.81, 0.92)})
                if samples:
                    recorder.sample(a_sample(step))
            if step < steps:
                metrics = {"loss": 1 / (step + 1), "reverse_kl": 1 / (step + 2), "time/rollout": 2.0, "time/step": 3.0}
                recorder.step(step, {**metrics, "my/own metric": float(step)})
                if samples:
                    recorder.sample(a_sample(step, phase="train"))
    if summary:
        write_summary(run / "summary.json", SUMMARY)
    return run

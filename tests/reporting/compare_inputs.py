"""Run folders with known numbers, to be compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from opd.reporting import RunRecorder, write_summary
from opd.reporting.intervals import mean_interval, wilson_interval
from reporting.report_inputs import a_sample

RECIPE: dict[str, Any] = {
    "student": {"model": "small"},
    "teacher": {"model": "large"},
    "prompts": {"path": "train.jsonl", "eval_path": "test.jsonl"},
    "objective": {"divergence": "reverse_kl"},
    "rollout": {"max_new_tokens": 16},
    "optimizer": {"lr": 1e-3},
    "train": {"steps": 4},
    "eval": {"every": 4, "prompts": 4, "samples_per_prompt": 1, "temperature": 1.0, "reward": "exact_match"},
    "log": {"samples": 4, "samples_every": 1},
}


def a_recipe(run: Path, seed: int = 0, **changes: object) -> dict[str, Any]:
    """RECIPE with changes, whose keys have __ for the dots."""
    recipe = {name: dict(section) for name, section in RECIPE.items()} | {"run_dir": str(run), "seed": seed}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            recipe[section] = {**recipe.get(section, {}), name: value}
        else:
            recipe[section] = value
    return recipe


def write_compared(
    run: Path,
    *,
    right: Sequence[float] = (1, 0, 1, 0),
    kl: Sequence[float] = (0.1, 0.2, 0.3, 0.4),
    seed: int = 0,
    measure: str | None = "m1",
    per_prompt: bool = True,
    samples: bool = False,
    steps: int = 4,
    finished: bool = True,
    recipe: bool = True,
    **changes: object,
) -> Path:
    """A run whose last evaluation found `right` and `kl`, prompt by prompt, and whose first found nothing right and 1 nat."""
    run.mkdir(parents=True)
    if recipe:
        (run / "config.yaml").write_text(yaml.safe_dump(a_recipe(run, seed, **changes)))
    with RunRecorder(run, resume_step=None) as recorder:
        for at, values, nats in ((0, [0.0] * len(right), [1.0] * len(kl)), (steps, list(right), list(kl))):
            for step in range(max(at - steps, 0), at):
                recorder.step(step, {"loss": 1 / (step + 1), "tokens": 100.0, "time/step": 2.0})
            metrics = {"accuracy": sum(values) / len(values), "reverse_kl": sum(nats) / len(nats), "time/eval": 1.0}
            bounds = {"accuracy": wilson_interval(int(sum(values)), len(values)), "reverse_kl": mean_interval(nats)}
            rows = {"accuracy": values, "reverse_kl": nats} if per_prompt else None
            recorder.evaluation(at, "student", metrics, bounds, measure, rows)
            for index, (value, nat) in enumerate(zip(values, nats, strict=True)) if samples else ():
                asked = {"prompt": f"{index} + 1 =", "prompt_index": index, "reward": value}
                recorder.sample(a_sample(at, reverse_kl=(nat, nat), **asked))
    if finished:
        write_summary(run / "summary.json", {"steps": steps})
    return run

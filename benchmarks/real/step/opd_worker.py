"""One timed run of opd's trainer on the real model. `python -m benchmarks.real.step.opd_worker CASE RESULT`."""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch

from benchmarks.loop.clock import StepClock, read_case
from benchmarks.loop.opd_worker import VERSIONS, recipe, train
from benchmarks.real.step.machine import ProductTypes, peak_bytes, rates
from opd.trainer.from_config import RunComponents


def main(case_path: str, result_path: str) -> None:
    case = read_case(case_path)
    torch.set_num_threads(case.threads)
    measured, clock = rates(), StepClock()
    types = ProductTypes(clock)
    with tempfile.TemporaryDirectory() as run_dir:
        parts: Any = RunComponents(recipe(case, run_dir))
        types.watch(parts.student.model)
        types.watch(parts.teacher.model)
        sampled = train(parts, clock)
    clock.write(
        result_path,
        prompts=[r.prompt_ids for step in sampled for r in step],
        versions=VERSIONS,
        lengths=[[(len(r.prompt_ids), len(r.response_ids)) for r in step] for step in sampled],
        peak_bytes=peak_bytes(),
        products=types.text(),
        **measured,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

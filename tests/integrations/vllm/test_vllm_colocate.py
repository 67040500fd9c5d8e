"""vLLM in this process: weights straight from memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from vllm_world import PROMPTS, recipe, sampler_gap

from opd.reporting.record import read_metrics
from opd.samplers.base import Sampling
from opd.trainer.from_config import RunComponents
from opd.trainer.run import train

pytestmark = pytest.mark.timeout(300)


def test_a_run_beside_vllm_stays_on_policy_and_memory_is_given_back(world: Path, tmp_path: Path):
    config = recipe(world, tmp_path / "run", rollout__vllm__mode="colocate", eval__every=5, optimizer__lr=1e-2)
    train(config)
    steps = [r.metrics for r in read_metrics(tmp_path / "run") if r.kind == "step"]
    assert len(steps) == 5 and all(step["sampler_student_gap"] < 1e-4 for step in steps)


def test_log_probs_after_every_reload_are_the_new_student_s(world: Path, tmp_path: Path):
    parts = RunComponents(
        recipe(
            world,
            tmp_path / "run",
            rollout__vllm__mode="colocate",
            rollout__vllm__max_model_len=64,
            student__lora__rank=4,
        )
    )
    sampling = Sampling(max_new_tokens=12, temperature=0.8, top_k=30)
    sampler = parts.student_sampler.with_sampling(sampling)
    assert parts.engine is not None
    for _ in range(3):
        parts.sampler.load(parts.student)
        sampler = parts.student_sampler.with_sampling(sampling)
        for rollout in sampler.sample(PROMPTS * 3, seed=2):
            assert rollout.policy_version == parts.student.version
            assert sampler_gap(parts.student.model, rollout, sampling) < 1e-4
        with torch.no_grad():
            for name, parameter in parts.student.model.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        parts.student.version += 1
    parts.engine.close()

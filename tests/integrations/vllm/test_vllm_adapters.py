"""A real vLLM server that has the base once and applies the student's adapters itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import vllm_world as world_of
from test_vllm_server import WIDE, worst
from vllm_world import PROMPTS, recipe

from opd.trainer.from_config import RunComponents

pytestmark = pytest.mark.timeout(300)


def nudge_adapters(parts: RunComponents) -> None:
    with torch.no_grad():
        for name, parameter in parts.student.model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    parts.student.version += 1


def test_adapters_follow_every_update_and_a_killed_server_comes_back_with_the_last(world: Path, tmp_path: Path):
    parts = RunComponents(recipe(world, tmp_path / "run", student__lora__rank=4, rollout__vllm__max_model_len=96))
    engine: Any = parts.engine
    asked: list[str] = []
    try:
        parts.sampler.load(parts.student)
        call = engine._http._call
        engine._http._call = lambda method, path, *more, **options: (
            asked.append(path),
            call(method, path, *more, **options),
        )[1]
        before = [parts.student_sampler.with_sampling(WIDE).sample(PROMPTS, seed=1)]
        for _ in range(3):
            nudge_adapters(parts)
            parts.sampler.load(parts.student)
            assert worst(parts, WIDE) < 1e-4
        assert asked.count("/v1/load_lora_adapter") == 3 and "/collective_rpc" not in asked
        after = parts.student_sampler.with_sampling(WIDE).sample(PROMPTS, seed=1)
        assert [r.sampler_logp for r in after] != [r.sampler_logp for r in before[0]], "the adapters changed something"
        for process in psutil.Process(engine._process._guard.pid).children(recursive=True):
            process.kill()
        assert worst(parts, WIDE) < 1e-4
        assert engine._process.starts == 2
    finally:
        engine.close()
    assert not world_of.servers(), "a server or a child of it is left"

"""Engines whose shards verl would keep in pinned memory run on a CPU too: the reference policy, and whatever is offloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine import EngineRegistry
from verl_engines import FP32, batch, engine, join, same, step

import opd.integrations.verl.dry_run.register

assert opd.integrations.verl.dry_run.register


def reference(models: Path, **settings: object):
    """As verl's worker builds it, before the actor."""
    join()
    built = EngineRegistry.new(
        model_type="language_model",
        backend="fsdp2",
        model_config=HFModelConfig(
            path=str(models / "student"), override_config={"attn_implementation": "sdpa"}, use_remove_padding=True
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2", forward_only=True, mixed_precision=FP32, use_torch_compile=False, **settings
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=10),
        checkpoint_config=None,
    )
    built.initialize()
    return built


@pytest.mark.parametrize("settings", [{}, {"offload_policy": True}], ids=["reference", "reference, offload_policy"])
def test_a_reference_policy_runs_on_a_cpu_and_its_log_probs_are_plain_transformers(models: Path, settings: dict):
    built, data = reference(models, **settings), batch()
    assert built.engine_config.forward_only and built.optimizer is None
    with built.eval_mode(), torch.no_grad():
        found = built.infer_batch(data, None)["model_output"]["log_probs"]
    plain = AutoModelForCausalLM.from_pretrained(models / "student", attn_implementation="eager", dtype=torch.float32)
    for ids, logp in zip(data["input_ids"].unbind(), found.unbind(), strict=True):
        with torch.no_grad():
            rows = plain(input_ids=ids.unsqueeze(0)).logits[0, :-1].log_softmax(-1)
        torch.testing.assert_close(logp[:-1], rows.gather(-1, ids[1:].unsqueeze(-1)).squeeze(-1), atol=1e-5, rtol=0)


def test_a_student_and_a_teacher_that_are_offloaded_make_the_same_step(models: Path):
    loss, gradients, _ = step(engine(models), batch())
    path = str(models / "teacher")
    offloaded = engine(models, offload_policy=True, teacher={"model": path, "offload": True})
    assert offloaded.engine_config.offload_policy
    same_loss, same_gradients, _ = step(offloaded, batch())
    assert same_loss == loss
    same(same_gradients, gradients)

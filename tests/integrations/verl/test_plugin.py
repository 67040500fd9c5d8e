"""The plugin is in: in a fresh process, and told apart from not being in."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from opd.integrations.verl.contract.doctor import run

LIGHT = """
import sys, time
import torch
import verl
before = set(sys.modules)
import opd.integrations.verl.plugin.register
print(sorted(m for m in set(sys.modules) - before if not m.startswith("opd")))
print([m for m in sys.modules if m.startswith("opd")])
"""

CALL = """
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import get_policy_loss_fn

policy_loss_fn = get_policy_loss_fn("on_policy_distillation")
generator = torch.Generator().manual_seed(0)
student_logits, teacher_logits = (torch.randn(2, 3, 11, generator=generator) for _ in range(2))
log_prob, response_mask = -torch.rand(2, 3, generator=generator), torch.tensor([[1, 1, 1], [1, 0, 0]])
p, q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
expected = (p.exp() * (p - q)).sum(-1)[response_mask.bool()].mean()
plain = {"policy_loss": "on_policy_distillation", "distillation_type": "reverse_kl", "distillation_temperature": 1.0}
for config in (None, plain, OmegaConf.create(plain), OmegaConf.create({"policy_loss": {"distillation_type": "reverse_kl"}})):
    logits = student_logits.clone().requires_grad_(True)
    loss, _, kl, _ = policy_loss_fn(
        old_log_prob=log_prob,
        log_prob=log_prob,
        advantages=torch.zeros(2, 3),
        response_mask=response_mask,
        loss_agg_mode="token-mean",
        config=config,
        teacher_logits=teacher_logits,
        student_logits=logits,
    )
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(kl, expected)
    assert logits.grad[response_mask.bool()].abs().sum() > 0
print("as expected")
"""


def test_the_doctor_finds_everything_in_place(capfd: pytest.CaptureFixture[str]):
    assert run() == 0
    out = capfd.readouterr().out
    assert "FAIL" not in out and "`import verl` loads the plugin" in out


def test_the_doctor_tells_when_verl_was_told_to_load_no_plugins(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    assert run() == 1
    assert "FAIL  `import verl` did not load the plugin" in capfd.readouterr().out


def test_on_a_gpu_machine_the_plugin_imports_nothing_of_its_own():
    env = {**os.environ, "VERL_PLATFORM": "nvidia"}
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    new, ours = done.stdout.splitlines()[-2:]
    assert new == "[]"
    assert ours == str(
        [
            "opd",
            "opd.integrations",
            "opd.integrations.verl",
            "opd.integrations.verl.plugin",
            "opd.integrations.verl.plugin.register",
        ]
    )


def test_verls_registry_gives_the_policy_loss_to_a_process_that_imports_verl_alone():
    """Called with logits and a config of plain keys: loss, clip fraction, KL, lower clip fraction."""
    done = subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True, timeout=120, env={**os.environ})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "as expected"


TRAINERS = """
import sys
import verl
assert "verl.trainer.ppo.v1" not in sys.modules
from verl.trainer.ppo.v1 import get_trainer_cls
for mode in ("sync", "colocate_async", "separate_async"):
    ours, theirs = get_trainer_cls("opd_" + mode), get_trainer_cls(mode)
    assert issubclass(ours, theirs) and ours is not theirs and ours.mode == mode
    assert ours.step is not theirs.step and not ours.__abstractmethods__
print("all there")
"""


def test_verls_registry_gives_the_trainers_with_rules_to_a_process_that_imports_verl_alone():
    done = subprocess.run(
        [sys.executable, "-c", TRAINERS], capture_output=True, text=True, timeout=120, env={**os.environ}
    )
    assert done.stdout.splitlines()[-1:] == ["all there"], done.stderr

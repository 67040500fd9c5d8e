"""The CPU rollout draws from the distribution it says, and says the log-probs it drew with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from opd.errors import ConfigError
from opd.integrations.verl.dry_run.sampling import SamplingSettings, log_probs, sample, seed_of


def test_temperature_0_is_the_likeliest_token():
    assert log_probs(torch.tensor([[0.0, 2.0, 1.0]]), SamplingSettings(temperature=0.0)).tolist() == [
        [-torch.inf, 0.0, -torch.inf]
    ]


def test_top_k_and_top_p_keep_the_likeliest_and_renormalise():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert log_probs(logits, SamplingSettings(top_k=2)).exp()[0].tolist() == pytest.approx([0.625, 0.375, 0.0])
    assert log_probs(logits, SamplingSettings(top_p=0.6)).exp()[0].tolist() == pytest.approx([0.625, 0.375, 0.0])
    assert log_probs(logits, SamplingSettings(top_p=0.5)).exp()[0].tolist() == pytest.approx([1.0, 0.0, 0.0])


def test_log_probs_are_those_of_one_forward_pass_over_the_whole_sequence(models: Path):
    model = AutoModelForCausalLM.from_pretrained(models / "student", dtype=torch.float32).eval()
    prompt = [10, 20, 30]
    ids, logps = sample(model, prompt, SamplingSettings(temperature=1.5), max_tokens=20, stop_ids=(), seed=1)
    logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    expected = (logits / 1.5).log_softmax(-1).gather(-1, torch.tensor(ids).unsqueeze(-1)).squeeze(-1)
    assert logps == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_response_ends_with_its_stop_token(models: Path):
    model = AutoModelForCausalLM.from_pretrained(models / "student", dtype=torch.float32).eval()
    free, _ = sample(model, [10], SamplingSettings(), max_tokens=20, stop_ids=(), seed=1)
    cut, _ = sample(model, [10], SamplingSettings(), max_tokens=20, stop_ids=(free[5],), seed=1)
    assert cut == free[: free.index(free[5]) + 1]


def test_a_seed_is_a_function_of_what_it_is_made_from():
    assert seed_of(1, None, [2, 3], 0) == seed_of(1, None, [2, 3], 0) != seed_of(1, None, [2, 3], 1)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_settings_that_are_no_distribution_are_refused(wrong: dict):
    with pytest.raises(ConfigError, match=r"rollout temperature|top_p"):
        SamplingSettings(**wrong)

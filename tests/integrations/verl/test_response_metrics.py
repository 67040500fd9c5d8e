"""What the plugin measures of responses, for the rules of opd.guard: counted by hand from the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from verl_engines import RESPONSE_LENGTHS, batch, engine, jagged, step

from opd.integrations.verl.plugin.engine import PREFIX

EOS = 257  # of the byte tokenizer
SAMPLING = {"response_length": 6, "top_p": 1.0, "top_k": -1}


def measured(models: Path, data, sampling=SAMPLING, **keys) -> dict[str, float]:
    built = engine(models, **keys)
    built.sampling = dict(sampling)
    return {name.removeprefix(PREFIX): value for name, value in step(built, data)[2].items()}


def changed(rows: dict[int, list[int]], **keys):
    """The batch, with the first tokens of some responses changed."""
    data = batch(**keys)
    prompts, responses = data["prompts"].unbind(), [one.clone() for one in data["responses"].unbind()]
    for row, ids in rows.items():
        responses[row][-len(ids) :] = torch.tensor(ids)
    data["responses"] = jagged(responses)
    data["input_ids"] = jagged([torch.cat(pair) for pair in zip(prompts, responses, strict=True)])
    return data


@pytest.mark.parametrize("size", [4, 1])
@pytest.mark.parametrize("remove_padding", [True, False])
def test_lengths_cuts_and_repetitions_are_those_of_whole_responses(models: Path, size: int, remove_padding: bool):
    """Of 6, 1, 8 and 4 tokens: the third is as long as allowed without an end, the first ends there, the last repeats itself."""
    rows = {0: [EOS], 2: [97, 98, 99, 97, 98, 99, 97, 98]}
    data = changed(rows, micro_batch_size=size, remove_padding=remove_padding)
    found = measured(models, data, remove_padding=remove_padding)
    assert found["response_length"] == pytest.approx(sum(RESPONSE_LENGTHS) / 4)
    assert found["truncated"] == 0.25
    assert found["repetition"] == pytest.approx((2 / 5) / 4)  # abca bcab cabc, abca, bcab


def test_masked_tokens_of_a_tool_count_as_length(models: Path):
    data = batch(hide=((0, 2), (0, 3)))
    found = measured(models, data)
    assert found["response_length"] == pytest.approx(sum(RESPONSE_LENGTHS) / 4)
    assert found["truncated"] == 0.5  # the first has 6 tokens all the same


def test_a_response_that_fills_up_a_batch_is_left_out(models: Path):
    data = batch(hide=((1, 0),))
    assert measured(models, data)["response_length"] == pytest.approx((6 + 8 + 4) / 3)


def test_without_a_known_limit_nothing_is_said_of_cuts(models: Path):
    assert "truncated" not in measured(models, batch(), {})


def sampled(models: Path, shift: float, **keys):
    """The batch, with log-probs of a sampler that is off by `shift` nats at every token."""
    data = batch(**keys)
    model = AutoModelForCausalLM.from_pretrained(models / "student", dtype=torch.float64)
    logps = []
    for prompt, response in zip(data["prompts"].unbind(), data["responses"].unbind(), strict=True):
        with torch.no_grad():
            logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1, :258]
        logps.append((logits.log_softmax(-1).gather(-1, response[:, None])[:, 0] - shift).float())
    data["rollout_log_probs"] = jagged(logps)
    return data


def test_the_gap_to_the_sampler_is_of_the_first_update_of_a_step_alone(models: Path):
    built = engine(models)
    built.sampling = dict(SAMPLING)
    gaps = []
    for number in (0, 0, 1):
        built.lr_scheduler.last_epoch = number
        gaps.append(step(built, sampled(models, 0.25))[2].get(f"{PREFIX}sampler_student_gap"))
    assert gaps == [pytest.approx(0.25, abs=1e-5), None, pytest.approx(0.25, abs=1e-5)]


@pytest.mark.parametrize(("sampling", "keys"), [({"top_p": 0.9}, {}), ({"top_k": 20}, {}), ({}, {"temperature": 0.7})])
def test_no_gap_is_told_where_the_sampler_drew_from_another_distribution(models: Path, sampling, keys):
    found = measured(models, sampled(models, 0.25, **keys), SAMPLING | sampling)
    assert "sampler_student_gap" not in found

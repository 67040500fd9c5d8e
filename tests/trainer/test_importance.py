"""Weights of an engine's samples, by pencil: cut at the cap, put where they are read once, and absent from exact losses."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from opd.config.recipe import build
from opd.data.pack import pack
from opd.errors import ServerError
from opd.losses import Hybrid, Objective, policy_gradient_loss
from opd.testing import digit_tokenizer, tiny_causal_lm
from opd.trainer.importance import GAP, EngineCorrection, correction_note, engine_correction
from opd.trainer.scoring import Batches, Scored
from opd.types import Batch, Prompt, Rollout

OWN = torch.log(torch.tensor([0.5, 0.2, 0.6, 0.1]))
THEIRS = torch.log(torch.tensor([0.5, 0.4, 0.2, 0.1]))
RATIOS = [1.0, 0.5, 3.0, 1.0]


class Known:
    """A student whose log-probs are given."""

    def log_prob(self, batch: Batch, temperature: float) -> torch.Tensor:
        return OWN


def scored(objective: Hybrid, **more: Any) -> Scored:
    rollout = Rollout(
        prompt=Prompt(index=0, text="1>"),
        prompt_ids=(1, 10),
        response_ids=(1, 2, 3, 4),
        sampler_logp=tuple(THEIRS.tolist()),
        finished=False,
        policy_version=0,
        id=0,
    )
    batches = pack([rollout], None, layout="packed", tokens_per_microbatch=100, pad_id=0, **more)
    return Scored(batches=Batches(batches), objective=objective, trained_on=2, metrics={})


def corrected(objective: Hybrid, cap: float = 2.0, **more: Any) -> Scored:
    made = EngineCorrection(cap=cap, max_gap=10.0, plain=True)
    return made.corrected(Known(), scored(objective, **more))  # pyright: ignore[reportArgumentType]


K1 = Objective(support="sampled", estimator="k1", delivery="advantage")
K2 = Objective(support="sampled", estimator="k2")


def test_a_token_s_weight_is_the_quotient_of_probabilities_up_to_the_cap():
    (batch,) = corrected(Hybrid(distill=K2)).batches
    assert (batch.token_weights * 4).tolist() == pytest.approx([1.0, 0.5, 2.0, 1.0])


def test_a_policy_gradient_divides_by_the_sampler_itself_and_is_cut_at_the_cap():
    (batch,) = corrected(Hybrid(distill=K1)).batches
    assert (batch.token_weights * 4).tolist() == pytest.approx([1.0] * 4), "not twice"
    student_logp = OWN.clone().requires_grad_()
    loss = policy_gradient_loss(student_logp, torch.ones(4), batch.sampler_logp)
    assert loss.tolist() == pytest.approx([-1.0, -0.5, -2.0, -1.0])
    loss.sum().backward()
    assert student_logp.grad is not None and student_logp.grad.tolist() == pytest.approx([-1.0, -0.5, -2.0, -1.0])


def test_a_reward_beside_k2_is_weighed_once():
    hybrid = Hybrid(distill=K2, rl_weight=1.0)
    (batch,) = corrected(hybrid, advantages=[torch.ones(4)]).batches
    loss = policy_gradient_loss(OWN, torch.ones(4), batch.sampler_logp)
    assert (loss * batch.token_weights * 4).tolist() == pytest.approx([-1.0, -0.5, -2.0, -1.0])


def test_the_metrics_say_how_far_apart_the_two_are():
    metrics = corrected(Hybrid(distill=K2)).metrics
    capped = [1.0, 0.5, 2.0, 1.0]
    assert metrics["importance/max"] == pytest.approx(3.0) and metrics["importance/capped"] == 0.25
    assert metrics["importance/mean"] == pytest.approx(sum(capped) / 4)
    assert metrics["importance/effective_share"] == pytest.approx(sum(capped) ** 2 / (4 * sum(w * w for w in capped)))
    assert metrics[GAP] == pytest.approx((math.log(2) + math.log(3)) / 4)


def test_an_exact_loss_is_left_alone():
    before = scored(Hybrid(distill=Objective()))
    assert EngineCorrection(cap=2.0, max_gap=1.0, plain=True).corrected(Known(), before) is before  # pyright: ignore[reportArgumentType]


def test_samples_of_this_process_take_no_correction_and_no_note():
    config = build({"student": {"model": "s"}, "teacher": {"model": "t"}, "prompts": {"path": "p"}})
    assert engine_correction(config) is None and correction_note(config) == []
    vllm = replace(config, rollout=replace(config.rollout, engine="vllm"))
    assert "need no importance weights" in correction_note(vllm)[0]
    sampled = replace(vllm, objective=K1)
    assert "cut at rollout.importance_cap=2" in correction_note(sampled)[0]


def test_a_gap_above_the_limit_stops_the_run_and_one_below_does_not():
    limit = EngineCorrection(cap=2.0, max_gap=0.2, plain=True)
    limit.check({GAP: 0.2})
    limit.check({})
    for gap in (0.21, float("nan")):
        with pytest.raises(ServerError, match=r"max_gap=0.2.*--resume"):
            limit.check({GAP: gap})


def test_the_log_probs_of_the_student_are_those_of_its_own_forward_pass():
    from opd.models import response_logits
    from opd.teachers.vocabulary import VocabularyMatch
    from opd.trainer import policy as module
    from opd.trainer.policy import Policy, no_teacher

    model = tiny_causal_lm(digit_tokenizer(), layers=1, hidden=32, vocab_size=20, initializer_range=0.4)
    policy = Policy(
        model, vocabulary=VocabularyMatch(size=13, invalid_ids=(0,)), eos_ids=(12,), teacher_logits=no_teacher
    )
    (batch,) = scored(Hybrid()).batches
    logits = response_logits(model, batch.sequences)[:, :13].detach() / 0.7
    logits[:, 0] = -torch.inf
    expected = logits.log_softmax(-1).gather(-1, batch.response_ids[:, None])[:, 0]
    for chunk in (1024, 3):
        module.LOG_PROB_CHUNK = chunk
        torch.testing.assert_close(policy.log_prob(batch, 0.7), expected)
    module.LOG_PROB_CHUNK = 1024
    policy.head_is_a_product = False
    torch.testing.assert_close(policy.log_prob(batch, 0.7), expected)

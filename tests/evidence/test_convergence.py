"""The convergence benchmark: its arithmetic, and its quick form as a command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.convergence.methods import METHODS
from benchmarks.convergence.model import Shape, TinyDecoder
from benchmarks.convergence.report import ratio
from benchmarks.convergence.task import VOCAB, accuracy, draw_prompts, generator, rewards
from benchmarks.convergence.train import Curve, Job, collect, total_loss

ROOT = Path(__file__).parents[2]
DIGITS = 3


@pytest.fixture
def model() -> TinyDecoder:
    return TinyDecoder(Shape(VOCAB, 2 * DIGITS + 1, hidden=16), seed=1)


def job(method: str) -> Job:
    return Job(
        method=METHODS[method],
        optimizer="adamw",
        lr=1e-3,
        rollouts=64,
        digits=DIGITS,
        domains=(0,),
        seed=0,
        max_steps=1,
    )


def test_a_level_is_reached_at_the_first_whole_step_on_the_line_between_evaluations():
    curve = Curve([0, 1, 2, 6], [0.0, 0.2, 0.1, 0.5])
    assert [curve.reached(level) for level in (0.0, 0.2, 0.21, 0.3, 0.5, 0.6)] == [0, 1, 4, 4, 6, None]


def test_the_ratio_of_means_lies_inside_its_interval_and_equal_ratios_have_none():
    found = ratio({0: 10.0, 1: 20.0, 2: 60.0}, {0: 10.0, 1: 10.0, 2: 10.0})
    assert found.value == 3.0 and 1.0 <= found.low < 3.0 < found.high <= 6.0
    same = ratio({0: 10.0, 1: 20.0}, {0: 5.0, 1: 10.0})
    assert (same.value, same.low, same.high) == (2.0, 2.0, 2.0)


def test_cached_sampling_draws_from_the_distribution_that_training_sees(model):
    prompts = draw_prompts(1, DIGITS, (0,), generator(0, 0, "x"))
    samples = model.sample(prompts.ids, 40_000, DIGITS, generator(0, 0, "y"))
    logp = model.response_logits(prompts.ids.expand(len(samples), -1), samples).log_softmax(-1)
    p = logp.view(len(samples), DIGITS, -1).exp().mean(0)  # of each place, averaged over the samples' own prefixes
    seen = torch.nn.functional.one_hot(samples, VOCAB).double().mean(0)
    assert (seen - p).abs().max() < 5 * (0.25 / len(samples)) ** 0.5


def test_exact_accuracy_is_what_sampling_finds(model):
    prompts = draw_prompts(4, DIGITS, (0, 1), generator(0, 0, "x"))
    with torch.no_grad():  # a model that is often right about what it repeats
        model.tokens.weight.mul_(30)
    samples = 20_000
    responses = model.sample(prompts.ids, samples, DIGITS, generator(0, 0, "y"))
    share = float(rewards(prompts, samples, responses).mean())
    exact = accuracy(model, prompts)[0]
    assert abs(share - exact) < 5 * (exact / (4 * samples)) ** 0.5 + 1e-4


@pytest.mark.parametrize("method", ["reverse_kl", "forward_kl", "jsd", "top_k", "sampled", "sampled_baseline"])
def test_a_teacher_that_is_the_student_gives_no_gradient_in_expectation(model, method):
    batch, logits = collect(job(method), model, [model], 0)
    gradient = torch.autograd.grad(total_loss(batch, logits(), METHODS[method].hybrid), list(model.parameters()))
    assert max(float(g.abs().max()) for g in gradient) < 1e-6


def test_seq_kd_is_the_mean_log_likelihood_of_the_teachers_samples(model):
    teacher = TinyDecoder(Shape(VOCAB, 2 * DIGITS + 1, hidden=16), seed=2)
    batch, logits = collect(job("seq_kd"), model, [teacher], 0)
    ours = torch.autograd.grad(total_loss(batch, logits(), METHODS["seq_kd"].hybrid), list(model.parameters()))
    plain = torch.autograd.grad(
        torch.nn.functional.cross_entropy(logits(), batch.response_ids), list(model.parameters())
    )
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.endurance
@pytest.mark.slow
def test_the_orderings_hold_on_a_small_cell():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "convergence", "--quick"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr

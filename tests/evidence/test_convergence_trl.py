"""The outside check of the convergence benchmark: TRL's GRPOTrainer does what the benchmark's GRPO does."""

from __future__ import annotations

import pytest
import torch
from benchmarks.convergence.gpt2 import as_decoder, as_gpt2, gpt2
from benchmarks.convergence.model import Shape, TinyDecoder
from benchmarks.convergence.outside import COLUMNS, OPD, REPLAY, TRL, OutsideRun, compare_losses, table
from benchmarks.convergence.task import VOCAB, draw_prompts, generator
from benchmarks.trl_environment import TRL_ENVIRONMENT

DIGITS = 3


@pytest.fixture
def model() -> TinyDecoder:
    return TinyDecoder(Shape(VOCAB, 2 * DIGITS + 1, hidden=16), seed=1)


def test_gpt2_with_the_decoders_weights_gives_its_log_probs(model):
    prompts = draw_prompts(64, DIGITS, (0,), generator(0, 0, "x"))
    with torch.no_grad():  # far from uniform
        model.tokens.weight.mul_(30)
        for parameter in model.parameters():  # nothing is 0 or 1 any more
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator(0, 0, "y")))
    ids = torch.cat([prompts.ids, prompts.answers[:, :-1]], dim=1)
    with torch.no_grad():
        ours, theirs = model(ids).log_softmax(-1), gpt2(model)(input_ids=ids).logits.log_softmax(-1)
    assert ours.std() > 1
    assert (ours - theirs).abs().max() < 1e-5


def test_weights_come_back_from_gpt2_as_they_were(model):
    state = model.state_dict()
    back = as_decoder(as_gpt2(state, model.shape.layers), model.shape.layers)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def run(trainer: str, seed: int, steps: tuple[int, int, int], curve: str = "0:0.0 1:0.1") -> OutsideRun:
    known = {"trainer": trainer, "seed": str(seed), "lr": "0.1", "rollouts": "256", "seconds_per_step": "0.5"}
    reached = {f"steps_{level}": str(s) for level, s in zip((50, 80, 90), steps, strict=True)}
    return OutsideRun(dict.fromkeys(COLUMNS, "") | known | reached | {"curve": curve})


def test_the_table_has_means_ranges_and_the_ratio_over_pairs_of_seeds():
    runs = [run(OPD, 0, (10, 20, 40)), run(OPD, 1, (30, 40, 80)), run(TRL, 0, (20, 40, 40)), run(TRL, 1, (60, 80, 80))]
    lines = table(runs).splitlines()
    assert "| opd | 2 | 20 (10–30) | 30 (20–40) | 60 (40–80) | 0.500 |" in lines
    twice, same = "[2.00, 2.00 to 2.00]", "[1.00, 1.00 to 1.00]"
    assert f"| TRL | 2 | 40 (20–60) {twice} | 60 (40–80) {twice} | 60 (40–80) {same} | 0.500 |" in lines
    assert "does not agree" in lines[-1] and "only at 90 %" in lines[-1]


def test_the_table_says_that_equal_runs_agree():
    assert "agrees with opd" in table([run(OPD, 0, (10, 20, 40)), run(TRL, 0, (10, 20, 40))])


def test_the_table_says_when_the_same_samples_part_from_the_same_curve():
    runs = [
        run(t, 0, (1, 2, 3), curve)
        for t, curve in ((OPD, "0:0.1 4:0.2 8:0.3"), (TRL, "0:0.1"), (REPLAY, "0:0.1 4:0.205 8:0.4"))
    ]
    assert "for the first 8 updates" not in table(runs)
    assert "for the first 4 updates" in table(runs)


@pytest.mark.slow
@pytest.mark.skipif(
    not (TRL_ENVIRONMENT / "bin" / "python").exists(), reason="`python -m benchmarks loop` makes TRL's environment"
)
def test_trls_loss_and_gradient_are_opds_on_the_same_samples():
    found = compare_losses()
    assert found["rewarded"] > 5 and found["largest_gradient"] > 1e-2 and abs(found["ratio_loss_value"]) > 1e-3
    assert found["log_prob"] < 1e-5
    assert found["loss"] < 1e-6
    assert found["ratio_loss"] < 1e-6  # with ratios on both sides of the clipping range
    assert found["gradient_same_advantages"] < 1e-6
    floor = 1e-4 / 0.5  # TRL's floor over the smallest standard deviation of four rewards of 0 or 1
    assert found["advantage"] < 1.01 * floor * found["largest_advantage"]
    assert found["gradient"] < 2 * floor * found["largest_gradient"]

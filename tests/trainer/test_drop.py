"""train.drop: responses that are cut off, repeat themselves or are correct leave the loss, which divides by what is left."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd.config.recipe import build, merge
from opd.errors import DataError
from opd.reporting.record import read_metrics, read_samples
from opd.samplers.base import draw
from opd.samplers.kept import LINES
from opd.trainer.distiller import Distiller
from opd.trainer.drop import NONE_LEFT, drop
from opd.trainer.from_config import RunComponents
from opd.trainer.keep_rollouts import keep_rollouts
from opd.trainer.metrics import TokenMetrics
from opd.trainer.run import train
from opd.types import Prompt, Rollout
from worlds import settings

QUICK = {"eval__every": 0, "train__steps": 3, "optimizer__warmup_steps": 0, "checkpoint__every": 1}


def response(ids: tuple[int, ...], *, finished: bool = True) -> Rollout:
    return Rollout(
        prompt=Prompt(index=0, text="q"), prompt_ids=(1,), response_ids=ids, sampler_logp=None, finished=finished,
        policy_version=0,
    )  # fmt: skip


LOOP, PLAIN, CUT = response((7,) * 9), response((1, 2, 3, 4, 5)), response((1, 2, 3, 4, 6), finished=False)


def halves(prompt, response):
    """Correct where the first character is an even digit."""
    return float(response[:1] in tuple("02468"))


def always(prompt, response):
    return 1.0


def parts_of(world: Path, tmp_path: Path, **more: object):
    parts = RunComponents(build(merge({}, settings(world, tmp_path / "parts", **more))))
    return parts, draw(parts.sampler, parts.schedule.take(0, 12), 2, seed=3)


def gradient(parts, scored) -> dict[str, torch.Tensor]:
    parts.student.zero_grad()
    for batch in scored.batches:
        parts.student.loss(batch, scored.objective, TokenMetrics()).backward()
    return {name: p.grad.clone() for name, p in parts.student.model.named_parameters()}


def test_each_kind_leaves_out_its_own_and_counts_it():
    rollouts = [LOOP, PLAIN, CUT, PLAIN]
    assert drop(rollouts, {"truncated"}, None).left == (0, 1, 3)
    assert drop(rollouts, {"repeating"}, None).left == (1, 2, 3)
    found = drop(rollouts, {"truncated", "repeating", "correct"}, (1.0, 1.0, 0.0, 0.9))
    assert found.left == (3,)
    assert found.metrics == {
        "drop/truncated": 1.0, "drop/repeating": 1.0, "drop/correct": 2.0, "drop/responses": 3.0,
        "truncated": 0.25, "repetition": pytest.approx((5 / 6) / 4), "response_length": 24 / 4,
    }  # fmt: skip


def test_half_of_the_4_grams_make_a_response_a_repeating_one():
    """(1 2 1 2 …): two different 4-grams, so of 4 of them half are repetitions, and of 3 a third."""
    assert drop([response((1, 2, 1, 2, 1, 2, 1))], {"repeating"}, None).left == ()
    assert drop([response((1, 2, 1, 2, 1, 2))], {"repeating"}, None).left == (0,)


@pytest.mark.parametrize("supply", ["hidden", "dense"])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_the_gradient_is_that_of_a_step_of_the_responses_left_alone(world, tmp_path, supply, reduction):
    more = {"teacher__supply": supply, "objective__reduction": reduction}
    parts, rollouts = parts_of(world, tmp_path, train__drop=["truncated"], **more)
    left = [r for r in rollouts if r.finished]
    assert 0 < len(left) < len(rollouts)
    whole, _ = parts_of(world, tmp_path, **more)
    scored = parts.scorer.score(rollouts, 0)
    found, expected = gradient(parts, scored), gradient(whole, whole.scorer.score(left, 0))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    weight = sum(float(batch.token_weights.sum()) for batch in scored.batches)
    assert weight == pytest.approx(1.0, abs=1e-6), "the weights of what is left sum to one"
    everything = gradient(whole, whole.scorer.score(rollouts, 0))
    assert any(not torch.equal(found[name], everything[name]) for name in found)


def test_the_entropy_share_is_of_the_tokens_left(world, tmp_path):
    parts, rollouts = parts_of(world, tmp_path, train__drop=["truncated"], train__token_fraction=0.5)
    tokens = sum(len(r.response_ids) for r in rollouts if r.finished)
    kept = sum(len(batch.token_weights) for batch in parts.scorer.score(rollouts, 0).batches)
    assert kept == math.ceil(0.5 * tokens)


def test_advantages_compare_with_the_responses_that_are_left_out_too(world, tmp_path):
    more = {"rl__weight": 1.0, "rl__reward": "worlds:first_digit", "train__samples_per_prompt": 4}
    parts, _ = parts_of(world, tmp_path, train__drop=["truncated"], **more)
    rollouts = draw(parts.sampler, parts.schedule.take(0, 6), 4, seed=3)
    scored = parts.scorer.score(rollouts, 0)
    assert parts.scorer.reinforcement is not None
    signal = parts.scorer.reinforcement.advantages(rollouts)
    assert scored.rewards == signal.rewards
    expected = {r.id: a for r, a in zip(rollouts, signal.per_token, strict=True)}
    seen = 0
    for batch in scored.batches:
        for index, rollout in enumerate(batch.rollouts):
            assert batch.advantages is not None
            assert torch.equal(batch.advantages[batch.sequence_index == index], expected[rollout.id])
            seen += 1
    assert seen == sum(r.finished for r in rollouts) < len(rollouts)


def test_a_step_whose_responses_are_all_left_out_updates_nothing_and_says_so(world, tmp_path, capsys):
    more = QUICK | {"train__drop": "correct", "rl__reward": "test_drop:always", "log__samples_every": 1}
    values = settings(world, tmp_path / "run", **(more | {"log__show_samples": 1, "log__progress": "plain"}))
    distiller = Distiller.from_config(build(merge({}, values)))
    parts = distiller.components
    before = {name: p.clone() for name, p in parts.student.model.named_parameters()}
    cut = [record.metrics for record in distiller.train().metrics]
    for name, p in parts.student.model.named_parameters():
        assert torch.equal(p, before[name]), name
    assert [row["drop/responses"] for row in cut] == [12.0] * 3
    assert all(math.isfinite(value) for row in cut for value in row.values()) and "loss" not in cut[0]
    assert capsys.readouterr().out.count(NONE_LEFT) == 3
    assert parts.student.version == 3


def test_samples_of_responses_that_are_left_out_are_recorded_without_a_kl(world, tmp_path):
    more = QUICK | {"train__drop": ["truncated"], "log__samples_every": 1, "log__samples": 12}
    train(build(merge({}, settings(world, tmp_path / "run", **more))))
    samples = [sample for sample in read_samples(tmp_path / "run") if sample.phase == "train"]
    assert len(samples) == 36 and {sample.finished for sample in samples} == {True, False}
    assert all((sample.reverse_kl is None) == (not sample.finished) for sample in samples)


def test_correct_responses_leave_a_pure_distillation_by_the_reward_of_the_evaluation(world, tmp_path):
    more = QUICK | {"train__drop": ["correct"], "eval__reward": "test_drop:halves"}
    train(build(merge({}, settings(world, tmp_path / "run", **more))))
    for record in read_metrics(tmp_path / "run"):
        row = record.metrics
        assert 0 < row["drop/correct"] == pytest.approx(12 * row["reward/mean"]) and row["drop/responses"] < 12
    plain = settings(world, tmp_path / "plain", **(more | {"train__drop": []}))
    train(build(merge({}, plain)))
    one, other = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("run", "plain"))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_log_reward_judges_the_responses_of_a_distillation_and_leaves_its_weights_alone(world, tmp_path):
    more = QUICK | {"eval__reward": "test_drop:halves", "log__samples_every": 1, "log__samples": 12}
    for name in ("judged", "plain"):
        train(build(merge({}, settings(world, tmp_path / name, **(more | {"log__reward": name == "judged"})))))
    steps = [record.metrics for record in read_metrics(tmp_path / "judged")]
    of_step = [
        [s.reward for s in read_samples(tmp_path / "judged") if s.phase == "train" and s.step == n] for n in range(3)
    ]
    assert [row["reward/mean"] for row in steps] == pytest.approx([sum(rewards) / 12 for rewards in of_step])
    assert any(0 < row["reward/mean"] < 1 for row in steps)
    assert all("reward/mean" not in record.metrics for record in read_metrics(tmp_path / "plain"))
    one, other = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("judged", "plain"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_log_reward_is_refused_where_no_reward_can_judge(world, tmp_path):
    path = tmp_path / "bare.jsonl"
    path.write_text('{"prompt": "12>"}\n' * 8)
    values = settings(world, tmp_path / "run", **(QUICK | {"log__reward": True, "prompts__path": str(path)}))
    with pytest.raises(
        DataError, match=r"has no answer, and .*exact_match, which log\.reward asks.*set log\.reward to false"
    ):
        train(build(merge({}, values)))
    train(build(merge({}, values | {"log.reward": False})))


def test_correct_is_refused_where_no_reward_can_judge(world, tmp_path):
    path = tmp_path / "bare.jsonl"
    path.write_text('{"prompt": "12>"}\n' * 8)
    more = QUICK | {"train__drop": ["correct"], "prompts__path": str(path)}
    values = settings(world, tmp_path / "run", **more)
    with pytest.raises(
        DataError, match=r"has no answer, and rl\.reward=exact_match, which train\.drop=\[correct\] asks"
    ):
        train(build(merge({}, values)))
    assert not (tmp_path / "run" / "config.yaml").exists()
    train(build(merge({}, values | {"rl.reward": "test_drop:halves"})))  # the first advice
    train(build(merge({}, values | {"train.drop": ["truncated"]})), overwrite=True)  # the second


def test_kept_rollouts_are_all_drawn_and_scored_and_the_run_that_takes_them_leaves_its_own_out(world, tmp_path):
    kept = {"rollout__source": "cached", "rollout__path": str(tmp_path / "kept"), "train__drop": ["truncated"]}
    config = build(merge({}, settings(world, tmp_path / "run", **(QUICK | kept))))
    keep_rollouts(config, say=lambda _line: None)
    lines = [json.loads(line) for line in (tmp_path / "kept" / LINES).read_text().splitlines()]
    assert len(lines) == 80 and {line["finished"] for line in lines} == {True, False}
    assert all(len(line["reverse_kl"]) == len(line["response_ids"]) for line in lines)
    train(config)
    assert any(record.metrics["drop/truncated"] for record in read_metrics(tmp_path / "run"))

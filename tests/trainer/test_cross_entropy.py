"""rollout.cross_entropy: supervised learning on responses that the student did not draw, in the pass of the divergence."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from opd.config.recipe import build, merge
from opd.errors import ConfigError, ObjectiveError
from opd.losses import Hybrid
from opd.reporting.record import read_metrics
from opd.trainer.run import train
from worlds import settings

OTHERS = {
    "the data set's": {"rollout__lmbda": 0.5},
    "the teacher's": {"rollout__lmbda": 0.5, "rollout__off_policy": "teacher"},
    "the teacher's alone": {"rollout__lmbda": 0.0, "rollout__off_policy": "teacher"},
}
SHORT = {"train__steps": 4, "train__prompts_per_step": 12, "eval__every": 0, "checkpoint__every": 0}


def steps(world, folder, **more):
    train(build(merge({}, settings(world, folder, **{**SHORT, **more}))))
    return [row.metrics for row in read_metrics(folder) if row.kind == "step"]


@pytest.mark.parametrize("memory", ["fast", "minimal"])
@pytest.mark.parametrize("name", OTHERS)
def test_the_loss_has_the_cross_entropy_of_others_responses_and_of_no_own_one(world, tmp_path, name, memory):
    for row in steps(world, tmp_path / "run", rollout__cross_entropy=0.3, train__loss_memory=memory, **OTHERS[name]):
        others = (
            row if row["off_policy_share"] == 1 else {k: row[f"off_policy/{k}"] for k in ("tokens", "student_logp")}
        )
        wanted = row["reverse_kl"] - 0.3 * others["student_logp"] * others["tokens"] / row["tokens"]
        assert row["loss"] == pytest.approx(wanted, rel=1e-5)
        assert row["off_policy_share"] > 0 and not {"policy_loss", "clipped"} & row.keys()


def test_a_weight_of_0_changes_nothing(world, tmp_path):
    for name, more in (("without", {}), ("zero", {"rollout__cross_entropy": 0.0})):
        steps(world, tmp_path / name, rollout__lmbda=0.5, **more)
    without, zero = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("without", "zero"))
    assert all(torch.equal(without[key], zero[key]) for key in without)


def test_references_become_likelier_with_it(world, tmp_path):
    more = {"rollout__lmbda": 0.0, "train__steps": 25, "optimizer__lr": 0.01}
    plain = steps(world, tmp_path / "plain", **more)
    added = steps(world, tmp_path / "added", rollout__cross_entropy=1.0, **more)
    assert added[0]["student_logp"] == pytest.approx(plain[0]["student_logp"], rel=1e-6)
    assert added[-1]["student_logp"] > plain[-1]["student_logp"] + 0.05


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"rollout__cross_entropy": 0.5}, r"rollout\.cross_entropy=0\.5 is about responses that the student did not draw.*Set rollout\.lmbda below 1"),
        ({"rollout__cross_entropy": -1.0, "rollout__lmbda": 0.5}, r"must be a weight ≥ 0, not -1"),
        ({"rollout__cross_entropy": math.nan, "rollout__lmbda": 0.5}, r"must be a weight ≥ 0, not nan"),
        (
            {"rollout__cross_entropy": 0.5, "rollout__lmbda": 0.5, "objective__eos_groups": [[3, 4]]},
            r"rollout\.cross_entropy asks for the probability of single tokens",
        ),
        (
            {"rollout__cross_entropy": 0.5, "rollout__lmbda": 0.5, "rl__weight": 1.0, "rl__reward": "exact_match", "train__samples_per_prompt": 4},
            r"rollout\.lmbda=0\.5 takes some responses from elsewhere",
        ),
    ],
)  # fmt: skip
def test_what_it_cannot_go_with_is_refused(world, tmp_path, more, said):
    with pytest.raises(ConfigError, match=said):
        build(merge({}, settings(world, tmp_path / "run", **more)))


def test_a_hybrid_has_it_or_a_reward():
    with pytest.raises(ObjectiveError, match=r"cross_entropy=0\.5 is about responses of others"):
        Hybrid(cross_entropy=0.5, rl_weight=1.0)
    with pytest.raises(ObjectiveError, match=r"cross_entropy=-0\.5 must be a number ≥ 0"):
        Hybrid(cross_entropy=-0.5)

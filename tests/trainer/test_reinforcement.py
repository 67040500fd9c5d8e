"""Learning from a reward, alone and beside a teacher."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import statistics
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd.config.recipe import build, merge
from opd.errors import ConfigError, DataError, ObjectiveError
from opd.losses import Hybrid, Objective
from opd.models import response_logits
from opd.reporting.record import read_metrics
from opd.samplers.base import draw
from opd.teachers.local import LocalTeacher
from opd.trainer.from_config import RunComponents
from opd.trainer.hybrid_update import preview
from opd.trainer.metrics import TokenMetrics
from opd.trainer.reinforce import NO_SIGNAL
from opd.trainer.run import train
from opd.trainer.scoring import scored_batches
from worlds import settings

RL = {"rl__weight": 1.0, "rl__reward": "worlds:first_digit", "train__samples_per_prompt": 4}
PURE = {**RL, "rl__distill_weight": 0.0, "eval__reward": "worlds:first_digit"}
K1 = {"objective__support": "sampled", "objective__estimator": "k1", "objective__delivery": "advantage"}


def without_teacher(values: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in values.items() if key != "teacher.model"}


def run(values: dict[str, object], **options: bool) -> dict | None:
    return train(build(merge({}, values)), **options)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "student" / "model.safetensors")


def steps(run_dir: Path) -> list[dict[str, float]]:
    return [dict(r.metrics) for r in read_metrics(run_dir) if r.kind == "step"]


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def constant(prompt, response):
    return 0.5


def of_the_prompt_alone(prompt, response):
    return 0.1 * (1 + prompt.index % 7)


def leaving(prompt, response):
    raise SystemExit(0)


def hanging(prompt, response):
    while True:
        with suppress(Exception):
            time.sleep(0.01)


def broken_for_some(prompt, response):
    return math.nan if prompt.index % 2 else 1.0


LEARNS = {
    "grpo": {},
    "grpo without the standard deviation": {"rl__normalize_std": False, "objective__reduction": "sequence_mean"},
    "rloo": {"rl__advantage": "rloo", "rl__clip_range": None},
    "clip higher": {"rl__clip_high": 0.28},
    "packed, lora": {"train__layout": "packed", "student__lora__rank": 8, "optimizer__lr": 0.03},
}


@pytest.mark.parametrize("name", LEARNS)
def test_a_reward_alone_raises_itself_and_needs_no_teacher(world, tmp_path, name):
    more = {"train__steps": 25, "train__prompts_per_step": 16, "optimizer__lr": 0.01, "eval__prompts": 40} | LEARNS[
        name
    ]
    values = settings(world, tmp_path / "run", eval__every=25, checkpoint__every=0, **{**PURE, **more})
    summary = run(without_teacher(values))
    # five seeds of the run had 0.47 to 0.77
    assert summary["student_after"]["accuracy"] > summary["student_before"]["accuracy"] + 0.3
    assert "teacher" not in summary and "reverse_kl" not in summary["student_after"]
    rows = steps(tmp_path / "run")
    assert rows[-1]["reward/mean"] > rows[0]["reward/mean"] + 0.2
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_a_teacher_without_a_say_changes_nothing(world, tmp_path):
    run(settings(world, tmp_path / "with", **PURE))
    run(without_teacher(settings(world, tmp_path / "without", **PURE)))
    assert same(tmp_path / "with", tmp_path / "without")


@pytest.mark.parametrize("more", [{}, K1, {"rl__scale": "match"}, {**K1, "rl__combine": "advantages"}], ids=str)
def test_a_reward_of_weight_0_is_pure_distillation_bit_for_bit(world, tmp_path, more):
    hybrid = {**RL, "rl__weight": 0.0, **more}
    run(settings(world, tmp_path / "hybrid", **hybrid))
    plain = {key: value for key, value in hybrid.items() if not key.startswith("rl__")}
    run(settings(world, tmp_path / "plain", **plain))
    assert same(tmp_path / "hybrid", tmp_path / "plain")


@pytest.mark.parametrize("more", [{"rl__scale": "match"}, {**K1, "rl__combine": "advantages"}], ids=str)
def test_distillation_of_weight_0_is_pure_reinforcement_bit_for_bit(world, tmp_path, more):
    run(settings(world, tmp_path / "hybrid", **PURE, **more))
    run(settings(world, tmp_path / "pure", **PURE))
    assert same(tmp_path / "hybrid", tmp_path / "pure")


HYBRIDS = {
    "losses": {},
    "losses, matched": {"rl__scale": "match"},
    "advantages": {**K1, "rl__combine": "advantages"},
    "advantages, matched, with returns": {
        **K1, "rl__combine": "advantages", "rl__scale": "match", "objective__discount": 0.9, "objective__baseline": "value",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_run_tells_of_both_terms_at_every_step(world, tmp_path, name):
    """What the update computes is below."""
    run(settings(world, tmp_path / "run", **{**RL, "train__steps": 4, "eval__every": 0, **HYBRIDS[name]}))
    rows = steps(tmp_path / "run")
    assert len(rows) == 4
    for row in rows:
        assert {"reverse_kl", "policy_loss", "clipped", "reward/mean", "rl/weight"} <= row.keys()
        assert all(math.isfinite(value) for value in row.values())
    assert not same_start(world, tmp_path / "run")


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_gradient_is_linear_in_either_weight(rewarded, name):
    """While no ratio is clipped, in every form of the sum; and neither term is absent."""
    parts, rollouts, _ = rewarded(**HYBRIDS[name])

    def gradient(**weights: float) -> torch.Tensor:
        hybrid = dataclasses.replace(parts.scorer.score(rollouts, 0).objective, **weights)
        batches = parts.scorer.score(rollouts, 0).batches
        if hybrid.needs_preview:
            seen = preview(parts.student.token_loss, batches, hybrid)
            batches, hybrid = seen.batches, seen.objective
        return torch.cat([g.flatten() for g in gradients(parts.student, batches, hybrid).values()])

    for which in ("rl_weight", "distill_weight"):
        one, two, three = (gradient(**{which: weight}) for weight in (1.0, 2.0, 3.0))
        assert (two - one).norm() > 1e-3 * one.norm()
        assert ((three - two) - (two - one)).norm() < 1e-3 * (two - one).norm()


def same_start(world: Path, run_dir: Path) -> bool:
    start = load_file(world / "student" / "model.safetensors")
    return all(torch.equal(start[name], value) for name, value in weights(run_dir).items() if name in start)


def test_weights_move_as_scheduled_and_a_term_that_reaches_0_is_no_longer_asked(world, tmp_path):
    more = {"rl__weight_end": 0.0, "rl__distill_weight": 0.0, "rl__distill_weight_end": 2.0, "rl__schedule_steps": 4}
    run(settings(world, tmp_path / "run", **{**RL, **more, "train__steps": 6, "eval__every": 0}))
    rows = steps(tmp_path / "run")
    assert [row.get("rl/weight", 0.0) for row in rows] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert [row.get("rl/distill_weight", 2.0) for row in rows] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    assert ["reward/mean" in row for row in rows] == [True] * 4 + [False] * 2
    assert ["reverse_kl" in row for row in rows] == [False] + [True] * 5


# What the update computes


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory, request):
    """Parts of a hybrid run, and its first step's rollouts."""
    from worlds import make_world

    folder = tmp_path_factory.mktemp("rewarded")
    make_world(folder)

    def make(**more):
        parts = RunComponents(build(merge({}, settings(folder, folder / "run", **{**RL, **more}))))
        prompts = parts.schedule.take(0, 6)
        rollouts = draw(parts.sampler, prompts, 4, seed=3)
        return parts, rollouts, parts.scorer.score(rollouts, 0)

    return make


def gradients(student, batches, objective) -> dict[str, torch.Tensor]:
    student.zero_grad()
    for batch in batches:
        student.loss(batch, objective, TokenMetrics()).backward()
    found = {name: p.grad.clone() for name, p in student.model.named_parameters() if p.grad is not None}
    student.zero_grad()
    return found


def assert_close(found, expected):
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("fused", [True, False])
def test_the_gradient_is_that_of_the_clipped_policy_gradient_on_whole_logits(rewarded, fused):
    parts, _, scored = rewarded(rl__distill_weight=0.0)
    student, hybrid = parts.student, scored.objective
    student.head_is_a_product = fused
    # another behaviour policy, so that some ratios are clipped on either side
    batches = [
        dataclasses.replace(b, sampler_logp=b.sampler_logp + 0.4 * torch.randn_like(b.sampler_logp))
        for b in scored.batches
    ]
    found = gradients(student, batches, hybrid)
    student.zero_grad()
    clipped = 0
    for batch in batches:
        logits = response_logits(student.model, batch.sequences)[:, : student.vocabulary.size]
        logp = logits.log_softmax(-1).gather(-1, batch.response_ids[:, None]).squeeze(-1)
        ratio, a = (logp - batch.sampler_logp).exp(), batch.advantages
        surrogate = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        clipped += int((surrogate != ratio * a).sum())
        (-(batch.token_weights * surrogate).sum()).backward()
    assert clipped > 3, "the check needs tokens whose ratio is clipped"
    assert_close(found, {name: p.grad for name, p in student.model.named_parameters()})


@pytest.mark.parametrize("fused", [True, False])
def test_a_sum_of_losses_has_the_sum_of_their_gradients(rewarded, fused):
    parts, _, scored = rewarded(rl__weight=0.7, rl__distill_weight=0.3)
    student = parts.student
    student.head_is_a_product = fused
    both = gradients(student, scored.batches, scored.objective)
    distill = gradients(student, scored.batches, Objective())
    rl = gradients(student, scored.batches, dataclasses.replace(scored.objective, rl_weight=1.0, distill_weight=0.0))
    assert_close(both, {name: 0.3 * distill[name] + 0.7 * rl[name] for name in both})


@pytest.mark.parametrize("scale", ["none", "match"])
def test_combined_advantages_are_those_of_reward_and_teacher_weighed(rewarded, scale):
    more = {"rl__combine": "advantages", "rl__weight": 2.0, "rl__distill_weight": 0.5, "rl__scale": scale}
    parts, _, scored = rewarded(**K1, **more)
    seen = preview(parts.student.token_loss, scored.batches, scored.objective)
    assert seen.objective.distill_weight == 0 and seen.objective.rl_weight == 1
    gaps = []
    for batch in scored.batches:
        logits = response_logits(parts.student.model, batch.sequences).detach()
        teacher = parts.teacher.logits(batch.target)
        p, q = (x.log_softmax(-1).gather(-1, batch.response_ids[:, None]).squeeze(-1) for x in (logits, teacher))
        gaps.append(q - p)
    terms = torch.cat([b.advantages for b in scored.batches]), torch.cat(gaps)
    rl, distill = (x / x.std(correction=0) for x in terms) if scale == "match" else terms
    found = torch.cat([b.advantages for b in seen.batches])
    torch.testing.assert_close(found, 2.0 * rl + 0.5 * distill, rtol=1e-4, atol=1e-5)


def test_the_distillation_advantage_is_the_student_s_own_whatever_drew_the_tokens(rewarded):
    """Ratio and clip belong to the update, once: they are not in the advantage as well."""
    parts, _, scored = rewarded(**K1, rl__combine="advantages", objective__clip_range=0.2)
    found = []
    for shift in (0.0, 1.0):
        batches = [dataclasses.replace(b, sampler_logp=b.sampler_logp - shift) for b in scored.batches]
        seen = preview(parts.student.token_loss, batches, scored.objective)
        found.append(torch.cat([b.advantages for b in seen.batches]))
        assert all(torch.equal(a.sampler_logp, b.sampler_logp) for a, b in zip(batches, seen.batches, strict=True))
    assert torch.equal(*found)


@pytest.mark.parametrize("combine", ["losses", "advantages"])
def test_matching_does_not_depend_on_how_the_batch_is_cut(rewarded, combine):
    more = {**(K1 if combine == "advantages" else {}), "rl__combine": combine, "rl__scale": "match"}
    found = []
    for budget in (40, 100_000):
        parts, _, scored = rewarded(**more, train__tokens_per_microbatch=budget)
        seen = preview(parts.student.token_loss, scored.batches, scored.objective)
        assert all(value > 0 for value in seen.metrics.values())
        found.append((len(scored.batches), seen.metrics, gradients(parts.student, seen.batches, seen.objective)))
    (few, numbers, small), (one, whole_numbers, whole) = found
    assert few > one == 1
    assert numbers == pytest.approx(whole_numbers, rel=1e-5)
    assert_close(small, whole)


def test_matched_losses_have_the_spread_one(rewarded):
    parts, _, scored = rewarded(rl__scale="match", rl__weight=3.0, rl__distill_weight=2.0)
    seen = preview(parts.student.token_loss, scored.batches, scored.objective)
    a = torch.cat([b.advantages for b in scored.batches])
    losses = torch.cat([out.loss for _, out in seen.losses])
    assert seen.objective.rl_weight == pytest.approx(3.0 / float(a.std(correction=0)), rel=1e-5)
    assert seen.objective.distill_weight == pytest.approx(2.0 / float(losses.std(correction=0)), rel=1e-5)


def test_tokens_of_weight_0_have_no_part_in_the_spread(rewarded):
    parts, _, scored = rewarded(rl__scale="match")
    some = [dataclasses.replace(b, token_weights=b.token_weights * (b.advantages > 0)) for b in scored.batches]
    seen = preview(parts.student.token_loss, some, scored.objective)
    a = torch.cat([b.advantages for b in scored.batches])
    assert 0 < int((a > 0).sum()) < len(a)
    assert seen.metrics["rl/advantage_std"] == pytest.approx(float(a[a > 0].std(correction=0)), rel=1e-5)


def test_the_preview_keeps_no_whole_logits(rewarded):
    parts, _, scored = rewarded(rl__scale="match", teacher__supply="dense")
    assert scored.batches[0].target is not None
    assert all(
        batch.target is None for batch, _ in preview(parts.student.token_loss, scored.batches, scored.objective).losses
    )


@pytest.mark.parametrize("combine", ["losses", "advantages"])
def test_a_term_that_varies_by_rounding_alone_is_not_scaled_up(rewarded, combine):
    """The mean of six rewards of 0.1 is not 0.1, and a teacher with the student's weights is not exactly at 0."""
    more = {**(K1 if combine == "advantages" else {}), "rl__combine": combine, "rl__scale": "match"}
    parts, _, _ = rewarded(**more, train__samples_per_prompt=6, rl__reward=f"{__name__}:of_the_prompt_alone")
    rollouts = draw(parts.sampler, parts.schedule.take(0, 6), 6, seed=3)
    assert sum([0.1] * 6) / 6 != 0.1
    assert len({r.prompt.index % 7 for r in rollouts}) > 2
    seen = preview(parts.student.token_loss, (scored := parts.scorer.score(rollouts, 0)).batches, scored.objective)
    assert seen.metrics["rl/advantage_std"] == 0.0
    assert seen.objective.rl_weight == 1.0
    own = LocalTeacher(
        copy.deepcopy(parts.student.model), parts.renderer, vocabulary=parts.student.vocabulary, pad_id=parts.pad_id
    )
    own.bind_objective(scored.objective.distill)
    alike = scored_batches(
        rollouts, own, own.kind, advantages=[torch.randn(len(r.response_ids)) for r in rollouts], **parts.scorer.layout
    )
    seen = preview(parts.student.token_loss, alike, scored.objective)
    before = torch.cat([b.advantages for b in alike])
    if combine == "losses":
        assert seen.objective.distill_weight == 1.0
    else:
        after = torch.cat([b.advantages for b in seen.batches])
        torch.testing.assert_close(after, before / before.std(correction=0), rtol=1e-4, atol=1e-5)


ADVANTAGES = {
    "grpo": ({}, lambda r, rest: (r - statistics.mean([r, *rest])) / (statistics.stdev([r, *rest]) + 1e-6)),
    "grpo, not normalised": ({"rl__normalize_std": False}, lambda r, rest: r - statistics.mean([r, *rest])),
    "rloo": ({"rl__advantage": "rloo"}, lambda r, rest: r - statistics.mean(rest)),
}


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_compare_the_samples_of_one_prompt(rewarded, name):
    more, advantage = ADVANTAGES[name]
    parts, rollouts, _ = rewarded(**more)
    said = parts.scorer.reinforcement.advantages(rollouts)
    assert len(set(said.rewards)) > 1
    for start in range(0, len(rollouts), 4):
        rewards = said.rewards[start : start + 4]
        for i in range(4):
            expected = advantage(rewards[i], [r for j, r in enumerate(rewards) if j != i])
            assert said.per_token[start + i].tolist() == pytest.approx(
                [expected] * len(rollouts[start + i].response_ids), abs=1e-6
            )


# The reference


@pytest.mark.parametrize("lora", [False, True])
def test_the_reference_is_the_student_before_training_and_holds_it_back(world, tmp_path, lora):
    final = {}
    for beta in (0.001, 1.0):
        more = {"rl__reference_kl": beta, "train__steps": 20, "optimizer__lr": 0.01, "eval__every": 0}
        more |= {"student__lora__rank": 8} if lora else {}
        run(without_teacher(settings(world, tmp_path / str(beta), **{**PURE, **more})))
        rows = steps(tmp_path / str(beta))
        assert abs(rows[0]["rl/reference_kl"]) < 1e-5, "before the first update the student is the reference"
        final[beta] = sum(row["rl/reference_kl"] for row in rows[-4:]) / 4
    assert 0 < final[1.0] < 0.5 * final[0.001]


# What can go wrong


def test_equal_rewards_in_every_group_are_said_and_change_no_weight(world, tmp_path, capsys):
    more = {**PURE, "rl__reward": f"{__name__}:constant", "train__steps": 2, "log__progress": "plain", "eval__every": 0}
    run(without_teacher(settings(world, tmp_path / "run", **more)))
    shown = capsys.readouterr()
    assert NO_SIGNAL[:60] in " ".join((shown.out + shown.err).split())
    assert [row["rl/groups_without_signal"] for row in steps(tmp_path / "run")] == [1.0, 1.0]
    assert same_start(world, tmp_path / "run")


def test_a_reward_that_hangs_ends_the_run_with_the_prompt_it_hung_on(world, tmp_path):
    values = settings(world, tmp_path / "run", **{**PURE, "rl__reward": f"{__name__}:hanging", "reward__timeout": 0.2})
    with pytest.raises(
        DataError, match=r"reward 'hanging' gave no answer within 0.2 s for prompt \d+.*raise reward.timeout"
    ):
        run(without_teacher(values | {"eval.every": 0}))


def test_a_reward_that_leaves_does_not_end_the_process(world, tmp_path):
    values = settings(world, tmp_path / "run", **{**PURE, "rl__reward": f"{__name__}:leaving", "eval__every": 0})
    with pytest.raises(DataError, match=r"reward 'leaving' failed on prompt .*SystemExit"):
        run(without_teacher(values))


def test_failed_rewards_count_as_0_on_request_and_are_told(world, tmp_path, capsys):
    more = {**PURE, "rl__reward": f"{__name__}:broken_for_some", "reward__on_error": "zero"}
    values = settings(
        world, tmp_path / "run", **{**more, "log__progress": "plain", "train__steps": 3, "eval__every": 0}
    )
    run(without_teacher(values))
    for row in steps(tmp_path / "run"):
        assert row["reward/failed"] == pytest.approx(1 - row["reward/mean"])
    shown = capsys.readouterr()
    assert "rewards failed and count as 0: reward 'broken_for_some' returned nan" in " ".join(
        (shown.out + shown.err).split()
    )
    with pytest.raises(DataError, match="returned nan"):
        run(without_teacher(values | {"reward.on_error": "stop", "run_dir": str(tmp_path / "stops")}))


REFUSED = {
    "one sample per prompt": ({"train__samples_per_prompt": 1}, "train.samples_per_prompt=1 leaves nothing to compare with"),
    "nothing to train on": ({"rl__weight": 0.0, "rl__distill_weight": 0.0}, "both 0"),
    "nothing at the end": ({"rl__weight_end": 0.0, "rl__distill_weight_end": 0.0}, "both 0"),
    "a negative weight": ({"rl__weight": -1.0}, "rl.weight must be 0 or a positive number"),
    "off-policy samples": ({"rollout__lmbda": 0.5}, "rollout.lmbda=0.5 takes some responses from elsewhere"),
    "a nucleus": ({"rollout__top_p": 0.9}, "rollout.top_p=0.9 leaves tokens out"),
    "another temperature": ({"rollout__temperature": 0.7}, "rollout.temperature=0.7 is not objective.student_temperature=1.0"),
    "advantages of a loss": ({"rl__combine": "advantages"}, "delivery=advantage"),
    "returns beside a loss": ({**K1, "objective__discount": 1.0}, "combine=advantages"),
    "half a clip": ({"rl__clip_range": None, "rl__clip_high": 0.3}, "rl.clip_high is the upper end"),
    "a schedule of nothing": ({"rl__schedule_steps": 5}, "is how long a weight moves, and none does"),
    "a misspelt reward": ({"rl__reward": "exact_mach"}, "Did you mean 'exact_match'"),
    "a timeout below 0": ({"reward__timeout": -1}, "reward.timeout must be 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_reward_cannot_work_with_is_refused_before_anything_is_trained(world, tmp_path, name):
    more, said = REFUSED[name]
    with pytest.raises((ConfigError, ObjectiveError)) as error:
        RunComponents(build(merge({}, settings(world, tmp_path / "run", **{**RL, **more}))))
    assert said in str(error.value)


def test_distillation_without_a_teacher_is_refused_and_says_what_needs_none(world, tmp_path):
    with pytest.raises(ConfigError, match=r"'teacher' is not set.*rl.distill_weight=0"):
        run(without_teacher(settings(world, tmp_path / "run")))


def test_rows_without_an_answer_are_refused_by_the_reward_that_compares(world, tmp_path):
    rows = [{"prompt": f"{i}>", "answer": "1"} if i != 3 else {"prompt": "3>"} for i in range(8)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = settings(world, tmp_path / "run", **{**RL, "rl__reward": "exact_match"})
    with pytest.raises(DataError, match=r"Row 3 of .*p.jsonl' has no answer, and rl.reward=exact_match"):
        run(values | {"prompts.path": str(tmp_path / "p.jsonl")})


def test_a_hybrid_of_nothing_is_refused():
    with pytest.raises(ObjectiveError, match="both 0"):
        Hybrid(rl_weight=0.0, distill_weight=0.0)


@pytest.mark.parametrize("more", [PURE, {**RL, "rl__scale": "match"}], ids=["pure", "hybrid"])
def test_a_run_killed_between_update_and_record_resumes_to_the_same_weights(world, tmp_path, more):
    from test_resume import assert_same_run, run_in_fork

    more = {**more, "rl__weight_end": 0.5, "rl__reference_kl": 0.1}
    train(build(merge({}, settings(world, tmp_path / "reference", **more))))
    values = settings(world, tmp_path / "killed", **more)
    run_in_fork(values, die_at="between update and record")
    train(build(merge({}, values)), resume=True)
    assert_same_run(tmp_path / "killed", tmp_path / "reference")

"""Several teachers of one student: routed, mixed, weighed."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd.config.recipe import build, load, merge, to_yaml
from opd.errors import ConfigError, DataError, ObjectiveError, VocabularyError
from opd.losses import Hybrid, Objective, mix_teachers
from opd.models import response_logits
from opd.reporting.record import read_metrics
from opd.samplers.base import draw
from opd.testing import digit_tokenizer, save_model, tiny_causal_lm
from opd.trainer.from_config import RunComponents
from opd.trainer.metrics import TokenMetrics
from opd.trainer.run import train
from opd.trainer.scoring import top_entropy_mask
from worlds import make_world, settings

NAMES = ("even", "odd")


@pytest.fixture(scope="module")
def school(tmp_path_factory) -> Path:
    """A student and two teachers of different size; every prompt names one, and weights for both."""
    folder = make_world(tmp_path_factory.mktemp("school"))
    tokenizer = digit_tokenizer()
    for name, hidden, seed in (("even", 32, 5), ("odd", 48, 6)):
        model = tiny_causal_lm(tokenizer, hidden=hidden, layers=1, max_positions=64, seed=seed, initializer_range=0.4)
        save_model(model, tokenizer, folder / name)
    rows = [
        {
            "prompt": f"{i * 7919 % 10_000}>",
            "answer": str(i),
            "teacher": NAMES[i % 2],
            "mix": {"even": 0.25, "odd": 0.75},
        }
        for i in range(40)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def taught(school: Path, run_dir: Path, **more: object) -> dict[str, object]:
    values = settings(school, run_dir, **more)
    if "teacher__model" not in more:
        del values["teacher.model"]
    return {f"teachers.{name}.model": str(school / name) for name in NAMES} | values


def parts_of(school: Path, **more: object):
    parts = RunComponents(build(merge({}, taught(school, school / "run", prompts__shuffle=False, **more))))
    prompts = parts.schedule.take(0, 6)
    rollouts = draw(parts.sampler, prompts, 2, seed=3)
    return parts, rollouts, parts.scorer.score(rollouts, 0)


def steps(run_dir: Path) -> list[dict[str, float]]:
    return [dict(r.metrics) for r in read_metrics(run_dir) if r.kind == "step"]


LEARNS = {
    "routing": {},
    "routing, balanced, packed": {"mixture__balance_tokens": True, "train__layout": "packed"},
    "routing, top-k": {"teachers__even__supply": "top_k", "teachers__odd__supply": "top_k", "objective__support": "teacher_top_k", "objective__top_k": 4},
    "routing, logits": {"teachers__even__supply": "dense"},
    "probability": {"mixture__kind": "probability"},
    "logit, weights": {"mixture__kind": "logit", "mixture__weights": {"even": 0.3, "odd": 0.7}},
    "loss": {"mixture__kind": "loss"},
    "weights per prompt": {"mixture__kind": "probability", "mixture__weights_column": "mix"},
    "off-policy": {"rollout__lmbda": 0.5, "rollout__off_policy": "teacher"},
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNS)
def test_the_student_moves_toward_all_its_teachers(school, tmp_path, name):
    more = {"train__steps": 25, "train__prompts_per_step": 16, "eval__every": 25, "optimizer__lr": 0.01} | LEARNS[name]
    summary = train(build(merge({}, taught(school, tmp_path / "run", checkpoint__every=0, **more))))
    assert summary is not None
    # five seeds of the run had 0.28 to 0.79
    assert summary["student_after"]["reverse_kl"] < 0.85 * summary["student_before"]["reverse_kl"]
    evaluations = [r for r in read_metrics(tmp_path / "run") if r.kind == "eval" and r.who == "student"]
    for teacher in NAMES:
        key = f"teacher/{teacher}/reverse_kl"
        assert evaluations[-1].metrics[key] < evaluations[0].metrics[key]
    for row in steps(tmp_path / "run"):
        assert all(math.isfinite(value) for value in row.values())
        told = [row[f"teacher/{t}/{'share' if 'kind' not in str(more) else 'weight'}"] for t in NAMES]
        assert sum(told) == pytest.approx(1.0)


# Routing


def test_every_prompt_is_scored_by_the_teacher_it_names(school):
    parts, rollouts, scored = parts_of(school)
    teachers = parts.teacher.members
    for batch in scored.batches:
        (name,) = {r.prompt.teacher for r in batch.rollouts}
        expected = teachers[name].score(batch.rollouts, "dense")
        torch.testing.assert_close(parts.teacher.logits(batch.target), torch.cat([t.logits for t in expected]))
    assert sum(len(b.rollouts) for b in scored.batches) == len(rollouts)
    assert {r.prompt.teacher for r in rollouts} == set(NAMES)


def test_routing_equals_the_sum_of_two_runs_of_one_teacher_each(school):
    """The gradient of a routed step is that of each teacher on its own rollouts, divided by the count of all."""
    from opd.data.pack import pack

    parts, rollouts, scored = parts_of(school)
    student = parts.student
    found = gradients(student, scored.batches, scored.objective)
    tokens = sum(len(r.response_ids) for r in rollouts)
    total: dict[str, torch.Tensor] = {}
    for name, teacher in parts.teacher.members.items():
        own = [r for r in rollouts if r.prompt.teacher == name]
        layout = {"layout": "right_padded", "tokens_per_microbatch": 10_000, "pad_id": 0, "global_count": tokens}
        for key, value in gradients(student, pack(own, teacher.score(own, "hidden"), **layout), Objective()).items():
            total[key] = total.get(key, 0.0) + value
    for key, value in total.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)


def gradients(student, batches, objective) -> dict[str, torch.Tensor]:
    student.zero_grad()
    for batch in batches:
        student.loss(batch, objective, TokenMetrics()).backward()
    found = {name: p.grad.clone() for name, p in student.model.named_parameters() if p.grad is not None}
    student.zero_grad()
    return found


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("weights", [None, {"even": 0.2, "odd": 0.8}])
def test_balanced_tokens_weigh_as_the_weights_say(school, reduction, weights):
    more = {"mixture__balance_tokens": True, "objective__reduction": reduction}
    more |= {"mixture__weights": weights} if weights else {}
    _, rollouts, scored = parts_of(school, **more)
    lengths = {name: sum(len(r.response_ids) for r in rollouts if r.prompt.teacher == name) for name in NAMES}
    assert lengths["even"] != lengths["odd"], "the check needs an imbalance"
    for name in NAMES:
        own = sum(float(b.token_weights.sum()) for b in scored.batches if b.rollouts[0].prompt.teacher == name)
        assert own == pytest.approx((weights or {"even": 0.5, "odd": 0.5})[name], rel=1e-5)


def test_a_teacher_without_a_prompt_in_a_step_leaves_its_share_to_the_others(school):
    more = {"mixture__balance_tokens": True, "mixture__weights": {"even": 0.2, "odd": 0.8}}
    parts, rollouts, _ = parts_of(school, **more)
    own = [r for r in rollouts if r.prompt.teacher == "even"]
    sums = [float(b.token_weights.sum()) for b in parts.scorer.score(own, 0).batches]
    assert sum(sums) == pytest.approx(1.0, rel=1e-5)


def test_a_teacher_whose_tokens_weigh_nothing_leaves_the_balance_of_the_others(school):
    weights = {"even": 0.0, "odd": 1.0}
    _, _, scored = parts_of(school, mixture__balance_tokens=True, mixture__weights=weights, train__token_fraction=0.05)
    sums = dict.fromkeys(NAMES, 0.0)
    for batch in scored.batches:
        sums[batch.rollouts[0].prompt.teacher] += float(batch.token_weights.sum())
    assert sums["even"] == 0.0 and sums["odd"] == pytest.approx(1.0, rel=1e-5)


def test_routed_rollouts_keep_their_own_advantages_and_tokens(school):
    more = {"rl__weight": 1.0, "rl__reward": "worlds:first_digit", "train__token_fraction": 0.5}
    parts, rollouts, scored = parts_of(school, **more)
    said = parts.scorer.reinforcement.advantages(rollouts).per_token
    own = {id(r): (a, kept) for r, a, kept in zip(rollouts, said, top_entropy_mask(rollouts, 0.5), strict=True)}
    assert len({float(a[0]) for a in said}) > 1
    for batch in scored.batches:
        kept = torch.cat([own[id(r)][1] for r in batch.rollouts])
        assert torch.equal(batch.kept, kept)
        assert torch.equal(batch.advantages, torch.cat([own[id(r)][0] for r in batch.rollouts])[kept])


def test_tokens_of_weight_0_move_nothing_even_where_a_step_has_no_others(school, tmp_path):
    rows = [{"prompt": f"{i}>", "answer": str(i), "teacher": "even"} for i in range(20)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"mixture__balance_tokens": True, "mixture__weights": {"even": 0.0, "odd": 1.0}}
    more |= {"prompts__path": str(tmp_path / "p.jsonl"), "eval__every": 0, "train__steps": 2}
    train(build(merge({}, taught(school, tmp_path / "run", **more))))
    assert all(row["grad_norm"] == 0 and row["loss"] == 0 for row in steps(tmp_path / "run"))
    before, after = (load_file(f / "model.safetensors") for f in (school / "student", tmp_path / "run" / "student"))
    assert all(torch.equal(before[name], value) for name, value in after.items() if name in before)


def test_accuracy_is_told_for_every_teachers_own_prompts(school, tmp_path):
    more = {"eval__prompts": 40, "train__steps": 1, "eval__reward": "worlds:first_digit"}
    train(build(merge({}, taught(school, tmp_path / "run", **more))))
    for record in [r for r in read_metrics(tmp_path / "run") if r.kind == "eval"]:
        apart = [record.metrics[f"teacher/{name}/accuracy"] for name in NAMES]
        assert record.metrics["accuracy"] == pytest.approx(sum(apart) / 2)
        assert f"teacher/{NAMES[0]}/accuracy" in record.intervals


# Mixtures


@pytest.mark.parametrize("kind", ["probability", "logit", "loss"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_mixture_s_loss_and_gradient_are_those_of_the_plain_definition(school, kind, fused):
    more = {
        "mixture__kind": kind,
        "mixture__weights": {"even": 0.3, "odd": 0.7},
        "train__tokens_per_microbatch": 10_000,
    }
    parts, _, scored = parts_of(school, **more)
    student, objective = parts.student, Objective()
    student.head_is_a_product = fused
    metrics = TokenMetrics()
    (batch,) = scored.batches
    student.zero_grad()
    loss = student.loss(batch, scored.objective, metrics)
    loss.backward()
    found = {name: p.grad.clone() for name, p in student.model.named_parameters()}
    student.zero_grad()
    logits = response_logits(student.model, batch.sequences)
    logp = logits.log_softmax(-1)
    teachers = [parts.teacher.logits(t).log_softmax(-1) for t in batch.target.targets]
    weights = torch.tensor([0.3, 0.7])
    if kind == "loss":
        per_token = sum(w * (logp.exp() * (logp - t)).sum(-1) for w, t in zip(weights, teachers, strict=True))
    else:
        mixed = mix_teachers(teachers, weights, kind)
        per_token = (logp.exp() * (logp - mixed)).sum(-1)
    expected = (batch.token_weights * per_token).sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for name, parameter in student.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=2e-6)
    assert metrics.summary()["reverse_kl"] == pytest.approx(expected.item(), rel=1e-4), objective.divergence


@pytest.mark.parametrize("kind", ["probability", "logit", "loss"])
def test_every_teacher_of_a_mixture_has_its_own_distance_from_the_samples(school, kind):
    parts, rollouts, scored = parts_of(school, mixture__kind=kind)
    for name, teacher in parts.teacher.members.items():
        logp = torch.cat([t.teacher_logp for t in teacher.score(rollouts, "sampled")])
        drawn = torch.tensor([x for r in rollouts for x in r.sampler_logp])
        assert scored.metrics[f"teacher/{name}/teacher_logp"] == pytest.approx(float(logp.mean()), rel=1e-4)
        assert scored.metrics[f"teacher/{name}/reverse_kl_estimate"] == pytest.approx(
            float((drawn - logp).mean()), rel=1e-4
        )


def test_weights_of_a_prompt_s_own_come_before_the_general_ones(school):
    _, _, scored = parts_of(school, mixture__kind="loss", mixture__weights_column="mix")
    for batch in scored.batches:
        assert batch.target.weights.shape == (len(batch.response_ids), 2)
        assert torch.equal(batch.target.weights.unique(dim=0), torch.tensor([[0.25, 0.75]]))


def test_weights_move_as_scheduled(school):
    more = {
        "mixture__kind": "probability", "mixture__weights": {"even": 1.0, "odd": 0.0},
        "mixture__weights_end": {"even": 0.0, "odd": 1.0}, "mixture__schedule_steps": 4,
    }  # fmt: skip
    parts, rollouts, _ = parts_of(school, **more)
    told = [parts.scorer.score(rollouts, step).metrics["teacher/odd/weight"] for step in (0, 1, 2, 4, 7)]
    assert told == pytest.approx([0.0, 0.25, 0.5, 1.0, 1.0])


def test_a_weight_of_one_is_that_teacher_alone(school):
    parts, _, scored = parts_of(school, mixture__kind="probability", mixture__weights={"even": 0.0, "odd": 1.0})
    batches = [dataclasses.replace(b, target=b.target.targets[1]) for b in scored.batches]
    mixed = gradients(parts.student, scored.batches, scored.objective)
    for name, gradient in gradients(parts.student, batches, Objective()).items():
        torch.testing.assert_close(mixed[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_reward_stands_beside_several_teachers(school, tmp_path):
    more = {"rl__weight": 1.0, "rl__reward": "worlds:first_digit", "rl__scale": "match", "mixture__kind": "loss"}
    train(build(merge({}, taught(school, tmp_path / "run", eval__every=0, **more))))
    assert all({"policy_loss", "reverse_kl", "teacher/odd/weight"} <= row.keys() for row in steps(tmp_path / "run"))


def test_the_run_resumes_bit_for_bit_and_its_recipe_builds_itself_again(school, tmp_path):
    from test_resume import assert_same_run, run_in_fork

    more = {"mixture__balance_tokens": True, "mixture__weights": {"even": 0.4, "odd": 0.6}}
    config = build(merge({}, taught(school, tmp_path / "reference", **more)))
    train(config)
    values = taught(school, tmp_path / "killed", **more)
    run_in_fork(values, die_at="between update and record")
    train(build(merge({}, values)), resume=True)
    assert_same_run(tmp_path / "killed", tmp_path / "reference")
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "again.yaml") == config


# Refusals


REFUSED = {
    "both sections": ({"teacher__model": "even"}, "teacher is one teacher, and teachers (even, odd) are several"),
    "weights that do not sum to one": (
        {"mixture__kind": "loss", "mixture__weights": {"even": 0.5, "odd": 0.6}}, "{even: 0.5, odd: 0.6} sums to 1.1",
    ),
    "a negative weight": ({"mixture__kind": "loss", "mixture__weights": {"even": -0.5, "odd": 1.5}}, "must be ≥ 0"),
    "a weight of nobody": ({"mixture__kind": "loss", "mixture__weights": {"even": 0.5, "od": 0.5}}, "give every teacher one weight"),
    "weights that routing does not read": ({"mixture__weights": {"even": 0.5, "odd": 0.5}}, "would change nothing"),
    "a balance without routing": ({"mixture__kind": "loss", "mixture__balance_tokens": True}, "use kind=routing"),
    "a schedule of nothing": ({"mixture__kind": "loss", "mixture__schedule_steps": 3}, "they do not"),
    "a mixture of top-k": (
        {"mixture__kind": "probability", "teachers__even__supply": "top_k", "objective__support": "teacher_top_k"}, "whole distributions",
    ),
    "a misspelt key of a teacher": ({"teachers__even__modle": "x"}, "Did you mean 'teachers.even.model'"),
    "a teacher that is not a section": ({"teachers__third": "x"}, "'teachers.third' is a section"),
    "offload on a CPU": ({"teachers__even__offload": True}, "it runs on the CPU anyway"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_mixed_is_refused_before_anything_is_trained(school, tmp_path, name):
    more, said = REFUSED[name]
    with pytest.raises((ConfigError, ObjectiveError)) as error:
        RunComponents(build(merge({}, taught(school, tmp_path / "run", **more))))
    assert said in str(error.value)


def test_a_mixture_of_one_is_refused(world, tmp_path):
    with pytest.raises(ConfigError, match="there are not several"):
        build(merge({}, settings(world, tmp_path / "run", mixture__kind="loss")))


@pytest.mark.parametrize(
    ("row", "more", "said"),
    [
        ({"teacher": "third"}, {}, r"Prompt 0 names the teacher 'third', which is not there; the teachers are even, odd"),
        ({}, {}, r"Prompt 0 names no teacher"),
        ({"mix": {"even": 0.5, "odd": 0.4}}, {"mixture__kind": "loss", "mixture__weights_column": "mix"}, r"sum to 0\.9"),
        ({"mix": {"third": 1.0}}, {"mixture__kind": "loss", "mixture__weights_column": "mix"}, r"of even, odd"),
        ({"mix": "even"}, {"mixture__kind": "loss", "mixture__weights_column": "mix"}, r"Prompt 0 has 'even' as 'mix'"),
    ],
)  # fmt: skip
def test_a_prompt_without_a_teacher_of_its_own_is_named_before_the_run(school, tmp_path, row, more, said):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "12>", "answer": "1", **row}) + "\n")
    values = taught(school, tmp_path / "run", prompts__path=str(tmp_path / "p.jsonl"), **more)
    with pytest.raises(DataError, match=said):
        train(build(merge({}, values)))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_every_teacher_has_to_read_the_student_s_tokens(school, tmp_path):
    tokenizer = digit_tokenizer(separator="#")
    save_model(tiny_causal_lm(tokenizer, hidden=32, layers=1, max_positions=64), tokenizer, tmp_path / "other")
    values = taught(school, tmp_path / "run") | {"teachers.odd.model": str(tmp_path / "other")}
    with pytest.raises(VocabularyError, match=r"other' do not read the same token ids"):
        train(build(merge({}, values)))


def test_one_teacher_by_a_name_of_its_own_is_the_run_of_teacher(world, tmp_path):
    values = settings(world, tmp_path / "named", eval__every=0)
    train(build(merge({}, {"teachers.math.model": values.pop("teacher.model"), **values})))
    train(build(merge({}, settings(world, tmp_path / "plain", eval__every=0))))
    a, b = (load_file(tmp_path / n / "student" / "model.safetensors") for n in ("named", "plain"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_hybrid_of_weight_one_is_the_objective_itself():
    assert not Hybrid().needs_preview

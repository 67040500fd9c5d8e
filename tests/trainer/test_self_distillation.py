"""The student as its own teacher: without its adapter, as an average, or with more in the prompt."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd.config.recipe import build, load, merge, to_yaml
from opd.data.privileged import PrivilegedRenderer
from opd.errors import ConfigError, DataError
from opd.reporting.record import read_metrics
from opd.samplers.base import draw
from opd.testing import byte_tokenizer, digit_tokenizer, save_model, tiny_causal_lm
from opd.trainer.checkpoint import checkpoints
from opd.trainer.from_config import RunComponents
from opd.trainer.metrics import TokenMetrics
from opd.trainer.run import train
from opd.types import DenseTarget, Prompt
from worlds import settings

HINT = {"prompts__teacher_prompt": "{{ answer }}{{ prompt }}"}
LORA = {"student__lora__rank": 4}
SOURCES = {
    "student": {"teacher__source": "student"},
    "student, lora": {"teacher__source": "student", **LORA},
    "ema": {"teacher__source": "ema", "teacher__ema_decay": 0.9},
    "ema, lora": {"teacher__source": "ema", "teacher__ema_decay": 0.9, **LORA},
    "adapter off": {"teacher__source": "adapter_off", **LORA},
}


def values_of(world: Path, run_dir: Path, **more: object) -> dict[str, object]:
    values = settings(world, run_dir, **more)
    del values["teacher.model"]
    return values


def parts_of(world: Path, **more: object):
    parts = RunComponents(build(merge({}, values_of(world, world / "run", optimizer__lr=0.01, **more))))
    rollouts = draw(parts.sampler, parts.schedule.take(0, 6), 1, seed=3)
    return parts, rollouts


def steps(run_dir: Path) -> list[dict[str, float]]:
    return [dict(r.metrics) for r in read_metrics(run_dir) if r.kind == "step"]


@pytest.mark.parametrize("name", SOURCES)
def test_a_run_is_evaluated_against_the_teacher_with_the_hint(world, tmp_path, name):
    more = {"train__steps": 4, "eval__every": 4, "checkpoint__every": 0, **HINT, **SOURCES[name]}
    summary = train(build(merge({}, values_of(world, tmp_path / "run", **more))))
    assert summary is not None
    assert summary["student_before"]["reverse_kl"] > 0.1, "without the hint the student is another one"
    assert summary["teacher"]["reverse_kl"] == pytest.approx(0, abs=1e-6), (
        "the teacher is at 0 from itself, hint and all"
    )
    assert all(math.isfinite(value) for row in steps(tmp_path / "run") for value in row.values())


def test_a_student_that_sees_less_comes_to_agree_with_itself_that_sees_more(world, tmp_path):
    """Of seeds 0 to 4, none ended above 0.01 of where it began. A teacher that lags behind (ema) or stays (adapter_off) is not reached
    that soon; what those runs compute is in the tests of their gradients below."""
    more = {"train__steps": 40, "train__prompts_per_step": 12, "eval__every": 40, "optimizer__lr": 0.01}
    values = values_of(world, tmp_path / "run", **{**more, **HINT, **SOURCES["student"]}, checkpoint__every=0)
    summary = train(build(merge({}, values)))
    assert summary is not None
    assert summary["student_after"]["reverse_kl"] < 0.2 * summary["student_before"]["reverse_kl"]


def loss_and_gradient(parts, scored) -> tuple[float, dict[str, torch.Tensor]]:
    model, total = parts.student.model, 0.0
    parts.student.zero_grad()
    for batch in scored.batches:
        loss = parts.student.loss(batch, scored.objective, TokenMetrics())
        loss.backward()
        total += loss.item()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    parts.student.zero_grad()
    return total, found


@pytest.mark.parametrize("name", SOURCES)
def test_the_gradient_is_that_of_the_reverse_kl_to_the_teacher_of_this_step(world, name):
    """Two updates in, when the sources have parted. The teacher's logits are of a model of its own, fed token by token."""
    parts, rollouts = parts_of(world, **HINT, **SOURCES[name])
    model = parts.student.model
    first = copy.deepcopy(model)
    average = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(2):
        step_once(parts, rollouts)
        average = {n: 0.9 * average[n] + 0.1 * p.detach() for n, p in model.named_parameters()}
    teacher = copy.deepcopy(first if name == "adapter off" else model).requires_grad_(False)
    if "ema" in name:
        teacher.load_state_dict(average, strict=False)
    _, found = loss_and_gradient(parts, parts.scorer.score(rollouts, 2))
    assert found and all(value.isfinite().all() for value in found.values())
    tokens = sum(len(r.response_ids) for r in rollouts)
    for rollout in rollouts:
        seen = parts.renderer.tokenizer(rollout.prompt.answer + rollout.prompt.text)["input_ids"]
        logp = [
            m(input_ids=torch.tensor([[*ids, *rollout.response_ids]])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            for m, ids in ((model, rollout.prompt_ids), (teacher, seen))
        ]
        ((logp[0].exp() * (logp[0] - logp[1])).sum() / tokens).backward()
    for key, gradient in found.items():
        expected = dict(model.named_parameters())[key].grad
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=2e-5, msg=key)


@pytest.mark.parametrize("name", SOURCES)
def test_an_update_comes_closer_to_the_teacher_that_it_saw(world, name):
    """The same targets before and after; a small step, so that this holds whatever the landscape."""
    parts, rollouts = parts_of(world, **HINT, **SOURCES[name])
    for _ in range(2):
        step_once(parts, rollouts)
    for optimizer in parts.student.optimizers:
        optimizer.state.clear()
    parts.student.learning_rate_factors = [1.0] * len(parts.student.learning_rate_factors)
    for group in (g for o in parts.student.optimizers for g in o.param_groups):
        group["peak_lr"] = 1e-5
    scored = parts.scorer.score(rollouts, 2)
    # as whole logits: hidden states would meet the student's own head, which moves
    fixed = [
        dataclasses.replace(b, target=DenseTarget(logits=parts.teacher.logits(b.target).clone()))
        for b in scored.batches
    ]
    scored = dataclasses.replace(scored, batches=fixed)
    before, _ = loss_and_gradient(parts, scored)
    parts.student.update(scored.batches, scored.objective)
    after, _ = loss_and_gradient(parts, scored)
    assert after < before


def test_a_student_without_its_adapter_is_the_model_it_started_from(world, tmp_path):
    """The run is that of a teacher loaded from the student's own folder."""
    more = {**HINT, **LORA, "eval__every": 0, "optimizer__lr": 0.01}
    train(build(merge({}, values_of(world, tmp_path / "off", teacher__source="adapter_off", **more))))
    train(build(merge({}, settings(world, tmp_path / "apart", **{**more, "teacher__model": str(world / "student")}))))
    a, b = (load_file(tmp_path / n / "student" / "model.safetensors") for n in ("off", "apart"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SOURCES)
def test_before_the_first_update_the_teacher_is_the_student_given_the_hint(world, name):
    parts, rollouts = parts_of(world, **HINT, **SOURCES[name])
    model = parts.student.model
    for rollout, target in zip(rollouts, parts.teacher.score(rollouts, "dense"), strict=True):
        seen = parts.renderer.tokenizer(rollout.prompt.answer + rollout.prompt.text)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*seen, *rollout.response_ids]])).logits
        expected = logits[0, len(seen) - 1 : -1]
        torch.testing.assert_close(target.logits, expected, rtol=1e-4, atol=1e-4)


def step_once(parts, rollouts) -> None:
    scored = parts.scorer.score(rollouts, 0)
    parts.student.update(scored.batches, scored.objective)


def test_the_average_is_that_of_every_student_so_far(world):
    parts, rollouts = parts_of(world, **HINT, **SOURCES["ema"])
    expected = {n: p.detach().clone() for n, p in parts.student.model.named_parameters()}
    for _ in range(3):
        step_once(parts, rollouts)
        for name, parameter in parts.student.model.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * parameter.detach()
    for name, average in parts.student.ema.weights().items():
        torch.testing.assert_close(average, expected[name], rtol=1e-5, atol=1e-7)
        assert not average.requires_grad
    assert any(not torch.equal(expected[n], p) for n, p in parts.student.model.named_parameters())


def test_an_average_of_adapters_copies_nothing_else(world):
    parts, _ = parts_of(world, **HINT, **SOURCES["ema, lora"])
    average, student = (dict(m.named_parameters()) for m in (parts.student.ema.model, parts.student.model))
    for name, parameter in student.items():
        assert (average[name] is parameter) == (not parameter.requires_grad), name


@pytest.mark.parametrize("name", SOURCES)
def test_the_teacher_moves_with_the_student_or_stays_as_its_source_says(world, name):
    parts, rollouts = parts_of(world, **HINT, **SOURCES[name])
    before = torch.cat([t.logits for t in parts.teacher.score(rollouts, "dense")])
    trained = {n for n, p in parts.student.model.named_parameters() if p.requires_grad}
    for _ in range(2):
        step_once(parts, rollouts)
    after = torch.cat([t.logits for t in parts.teacher.score(rollouts, "dense")])
    assert torch.equal(before, after) == (name == "adapter off")
    assert {n for n, p in parts.student.model.named_parameters() if p.requires_grad} == trained, "still trainable"


@pytest.mark.parametrize("name", ["ema", "ema, lora", "adapter off"])
def test_a_killed_run_resumes_bit_for_bit(world, tmp_path, name):
    from test_resume import assert_same_run, run_in_fork

    more = {**HINT, **SOURCES[name]}
    train(build(merge({}, values_of(world, tmp_path / "reference", **more))))
    values = values_of(world, tmp_path / "killed", **more)
    run_in_fork(values, die_at="between update and record")
    train(build(merge({}, values)), resume=True)
    assert_same_run(tmp_path / "killed", tmp_path / "reference")
    last = [checkpoints(tmp_path / n / "checkpoints")[-1] for n in ("killed", "reference")]
    if "ema" in name:
        a, b = (load_file(path / "ema.safetensors") for path in last)
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_a_hint_also_helps_a_teacher_of_its_own_weights(world, tmp_path):
    """The template is about the prompt, whoever reads it."""
    parts = RunComponents(build(merge({}, settings(world, tmp_path / "run", **HINT))))
    prompt = parts.schedule.take(0, 1)[0]
    hinted = parts.renderer.tokenizer(prompt.answer + prompt.text)["input_ids"]
    assert parts.teacher.renderer.prompt_ids(prompt) == tuple(hinted)
    assert parts.renderer.prompt_ids(prompt) == tuple(parts.renderer.tokenizer(prompt.text)["input_ids"])


def test_a_reward_with_its_own_average_as_an_anchor(world, tmp_path):
    more = {"rl__weight": 1.0, "rl__reward": "worlds:first_digit", "teacher__source": "ema", "eval__every": 0}
    train(build(merge({}, values_of(world, tmp_path / "run", **more))))
    rows = steps(tmp_path / "run")
    assert rows[0]["reverse_kl"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["reverse_kl"] > 1e-6


def test_the_recipe_builds_itself_again(world, tmp_path):
    config = build(merge({}, values_of(world, tmp_path / "run", **HINT, **SOURCES["ema"])))
    (tmp_path / "r.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "r.yaml") == config


# The template


def test_the_template_takes_the_place_of_the_user_s_last_message_and_sees_every_column():
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}:"
    renderer = PrivilegedRenderer(
        byte_tokenizer(chat_template=template), "{{ prompt }} ({{ hint }}, {{ answer }})", name="teacher"
    )
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    prompt = Prompt(index=0, messages=tuple(messages), answer="42", metadata={"hint": "even"})
    assert bytes(renderer.prompt_ids(prompt)).decode() == "<user>a<assistant>b<user>c (even, 42):"
    assert [m["content"] for m in prompt.messages] == ["a", "b", "c"], "the prompt itself is as it was"


@pytest.mark.parametrize("row", [{"prompt": "1>"}, {"prompt": "1>", "answer": None}])
def test_a_row_without_the_field_is_named_before_the_run(world, tmp_path, row):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "1>", "answer": "2"}) + "\n" + json.dumps(row) + "\n")
    values = values_of(world, tmp_path / "run", **HINT, **SOURCES["student"], eval__every=0)
    with pytest.raises(DataError, match=r"teacher_prompt cannot be filled in for prompt 1: 'answer' is undefined"):
        train(build(merge({}, values | {"prompts.path": str(tmp_path / "p.jsonl")})))


@pytest.mark.parametrize("template", ["{{ answer + 1 }}", "{{ 1 / 0 }}", "{{ answer.lower(1, 2) }}"])
def test_whatever_goes_wrong_in_a_template_names_the_row(template):
    renderer = PrivilegedRenderer(digit_tokenizer(), template, name="teacher")
    with pytest.raises(DataError, match="teacher_prompt cannot be filled in for prompt 4"):
        renderer.prompt_ids(Prompt(index=4, text="1>", answer="2"))


def test_a_template_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="not a Jinja template"):
        PrivilegedRenderer(digit_tokenizer(), "{{ answer", name="teacher")


# Refusals


REFUSED = {
    "an adapter that is not there": ({**HINT, "teacher__source": "adapter_off"}, "set student.lora.rank"),
    "nothing to learn": ({"teacher__source": "student"}, "agrees with it everywhere"),
    "nothing to learn from an average": ({"teacher__source": "ema"}, "agrees with it everywhere"),
    "two answers": ({**HINT, "teacher__source": "ema", "teacher__model": "t"}, "teacher.model='t' is not read"),
    "a decay of one": ({**HINT, "teacher__source": "ema", "teacher__ema_decay": 1.0}, "teacher.ema_decay must lie in [0, 1)"),
    "the student off its device": ({**HINT, "teacher__source": "ema", "teacher__offload": True}, "take the student itself off"),
    "sixteen bits": ({**HINT, "teacher__source": "ema", "student__dtype": "bfloat16"}, "would round to none"),
    "no teacher at all": ({"rl__weight": 1, "rl__distill_weight": 0, **HINT}, "there is none"),
    "neither": ({"teacher__dtype": "float32"}, "teacher.source=ema"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_teaches_nothing_is_refused(world, tmp_path, name):
    more, said = REFUSED[name]
    values = values_of(world, tmp_path / "run")
    with pytest.raises(ConfigError) as error:
        RunComponents(build(merge({}, values | {key.replace("__", "."): value for key, value in more.items()})))
    assert said in str(error.value)


def test_a_hinted_teacher_may_be_one_of_several(world, tmp_path):
    save_model(
        tiny_causal_lm(digit_tokenizer(), hidden=32, layers=1, max_positions=64, seed=9),
        digit_tokenizer(),
        tmp_path / "t",
    )
    more = {
        **HINT,
        "teachers__self__source": "ema",
        "teachers__other__model": str(tmp_path / "t"),
        "mixture__kind": "loss",
    }
    train(build(merge({}, values_of(world, tmp_path / "run", **more))))
    assert all(row["teacher/self/weight"] == 0.5 for row in steps(tmp_path / "run"))

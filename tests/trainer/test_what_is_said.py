"""A run says what its numbers would not: answers cut off, a teacher with nothing to give, a warm-up that does not end."""

from __future__ import annotations

import json

import pytest

from opd.cli.show import show_result
from opd.config.recipe import build, merge
from opd.doctor.checks import notices
from opd.reporting.record import read_metrics
from opd.trainer.run import train
from worlds import settings

QUICK = {"train__steps": 2, "eval__every": 2, "checkpoint__every": 0, "log__progress": "plain"}


@pytest.mark.parametrize(("steps", "rates"), [(1, [1.0]), (5, [0.5, 1, 1, 1, 1]), (12, [1 / 3, 2 / 3, *[1] * 10])])
def test_a_short_run_reaches_its_rate(world, tmp_path, steps, rates):
    more = {"train__steps": steps, "optimizer__warmup_steps": None, "optimizer__lr": 1.0e-3, "eval__every": 0}
    values = settings(world, tmp_path / "run", **more) | {"checkpoint.every": 0, "train.prompts_per_step": 1}
    config = build(merge({}, values))
    assert not [n for n in notices(config) if "warmup" in n]
    train(config)
    assert [r.metrics["lr"] for r in read_metrics(tmp_path / "run")] == pytest.approx([1e-3 * rate for rate in rates])


@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (1000, 10), (50, 5), (2, 1)])
def test_the_warm_up_that_nobody_chose_is_a_tenth_of_the_run_and_stands_in_the_config(world, tmp_path, steps, warmup):
    more = {"train__steps": steps, "optimizer__warmup_steps": None}
    assert build(merge({}, settings(world, tmp_path, **more))).optimizer.warmup_steps == warmup
    natural = {**more, "optimizer__name": "natural_gradient", "optimizer__lr": None}
    assert build(merge({}, settings(world, tmp_path, **natural))).optimizer.warmup_steps == 0


def test_a_warm_up_longer_than_the_run_is_said(world, tmp_path):
    config = build(merge({}, settings(world, tmp_path, train__steps=5, optimizer__warmup_steps=10)))
    (said,) = [n for n in notices(config) if "warmup" in n]
    assert "warmup_steps=10 does not end within train.steps=5" in said and "never passes 45% of optimizer.lr" in said


@pytest.mark.parametrize("evaluated", [True, False])
def test_answers_that_are_cut_off_are_said_once_with_what_to_raise(world, tmp_path, capsys, evaluated):
    """The tiny models end by chance: of 2 tokens, most answers are cut."""
    values = settings(world, tmp_path / "run", rollout__max_new_tokens=2, **QUICK)
    if evaluated:  # training itself is not asked then: its short responses are meant
        values |= {"rollout.horizon_start": 1, "rollout.horizon_steps": 9}
    summary = train(build(merge({}, values | ({} if evaluated else {"eval.every": 0}))))
    out = capsys.readouterr().out
    assert out.count("of the answers were cut off at rollout.max_new_tokens=2") == 1
    assert "Raise rollout.max_new_tokens" in out
    if evaluated:
        assert "% cut off" in next(line for line in out.splitlines() if line.startswith("step 0: held-out"))
        assert summary is not None and any("were cut off" in note for note in summary["notes"])


def test_a_growing_horizon_is_not_blamed_for_what_it_cuts(world, tmp_path, capsys):
    values = settings(world, tmp_path / "run", **(QUICK | {"eval__every": 0, "train__steps": 1}))
    train(build(merge({}, values | {"rollout.horizon_start": 1, "rollout.horizon_steps": 8})))
    assert "cut off" not in capsys.readouterr().out


@pytest.mark.parametrize("privileged", [True, False])
def test_a_teacher_with_nothing_to_give_is_said_before_training_and_at_the_end(world, tmp_path, capsys, privileged):
    values = settings(world, tmp_path / "run", **QUICK)
    if privileged:
        values |= {"prompts.teacher_prompt": "{{ answer }}{{ prompt }}", "teacher.source": "student"}
        del values["teacher.model"]
    config = build(merge({}, values))
    summary = train(config)
    assert summary is not None
    said = "although it is shown prompts.teacher_prompt" if privileged else "than the student before training"
    before = capsys.readouterr().out
    assert before.index("not measurably better") < before.index("step 2/2") and said in before
    show_result(config, json.loads((tmp_path / "run" / "summary.json").read_text()))
    table = capsys.readouterr().out
    assert f"note: The teacher is not measurably better than the student {said if privileged else 'before'}" in table
    assert ("teacher, shown prompts.teacher_prompt" in table) == privileged
    assert "not measurably better" in (tmp_path / "run" / "report.html").read_text()

"""What a recipe may change between the start of a run and its --resume, decided by what it does to the mathematics."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_resume import assert_same_run
from transformers import AutoTokenizer

from opd.config import Config
from opd.config.recipe import build, merge, whole_keys
from opd.errors import DataError, RunFolderError
from opd.reporting.record import read_metrics
from opd.trainer import loop
from opd.trainer.guardrails import OUT_OF_MEMORY_ADVICE
from opd.trainer.resume import EFFECTS, effect_of, table_key
from opd.trainer.run import train
from worlds import settings


def run(values: dict[str, object], **options: bool) -> dict | None:
    return train(build(merge({}, values)), **options)


def stop_after(values: dict[str, object], steps: int) -> None:
    """A run whose last checkpoint is of this step; its schedule is constant, so the shorter run is the start of the longer one."""
    run(values | {"train.steps": steps})
    shutil.rmtree(Path(str(values["run_dir"])) / "student")


def quick(world: Path, run_dir: Path, **more: object) -> dict[str, object]:
    small = {"train__steps": 4, "eval__every": 0, "checkpoint__every": 1, "optimizer__warmup_steps": 0}
    return settings(world, run_dir, **(small | more))


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "student" / "model.safetensors")


def test_every_key_of_a_recipe_is_classified():
    keys = {table_key(key) for key in whole_keys()}
    assert sorted(keys) == sorted(EFFECTS), "classify a new key in trainer/resume.py"
    assert table_key("teachers.math.tokens_per_batch") == "teacher.tokens_per_batch"
    assert table_key("mixture.weights.math") == "mixture.weights"
    assert table_key("student.chat_template_kwargs.enable_thinking") == "student.chat_template_kwargs"


def test_the_reward_that_is_trained_on_cannot_change_and_the_one_that_is_only_measured_can(world, tmp_path):
    measured = build(merge({}, settings(world, tmp_path)))
    trained = build(merge({}, settings(world, tmp_path, rl__weight=1.0)))
    assert (effect_of("eval.reward", measured), effect_of("eval.reward", trained)) == ("evaluation", "all")


def test_what_errors_advise_to_lower_may_change_on_resume():
    """Every key that an out-of-memory message names can be followed with --resume, except those that it says need a new run."""
    for phase, advice in OUT_OF_MEMORY_ADVICE.items():
        for key in re.findall(r"\b(?:[a-z_]+\.)+[a-z_]+", advice.partition("a new run")[0]):
            assert EFFECTS[table_key(key)] in ("none", "later"), f"{phase}: {key}"


@pytest.mark.parametrize(
    "change",
    [
        {"train.tokens_per_microbatch": 20},
        {"teacher.tokens_per_batch": 20, "student.gradient_checkpointing": True},
        {"train.layout": "packed", "student.attn_implementation": "eager"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_costs_only_memory_ends_at_the_same_weights(world, tmp_path, change):
    run(quick(world, tmp_path / "whole"))
    values = quick(world, tmp_path / "changed")
    stop_after(values, 2)
    run(values | change, resume=True)
    ours, theirs = weights(tmp_path / "changed"), weights(tmp_path / "whole")
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)


def test_a_micro_batch_that_is_left_open_is_written_down_and_stays(world, tmp_path):
    """Its number is that of the machine and the model, and a resumed run rounds as it did."""
    values = quick(world, tmp_path) | {"train.tokens_per_microbatch": None}
    stop_after(values, 2)
    file = tmp_path / "config.yaml"
    assert yaml.safe_load(file.read_text())["train"]["tokens_per_microbatch"] == 8192
    file.write_text(file.read_text().replace("tokens_per_microbatch: 8192", "tokens_per_microbatch: 20"))
    run(values, resume=True)
    assert yaml.safe_load(file.read_text())["train"]["tokens_per_microbatch"] == 20
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert "train.tokens_per_microbatch" not in history[-1]["changed"]


def test_a_longer_run_with_a_constant_rate_is_the_run_that_was_long_from_the_start(world, tmp_path):
    run(quick(world, tmp_path / "long"))
    values = quick(world, tmp_path / "grown")
    run(values | {"train.steps": 2})
    run(values, resume=True)
    ours, theirs = weights(tmp_path / "grown"), weights(tmp_path / "long")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_same_files_under_another_path_resume_bit_for_bit(world, tmp_path):
    run(quick(world, tmp_path / "whole"))
    for name in ("student", "teacher"):
        shutil.copytree(world / name, tmp_path / "old" / name)
    shutil.copy(world / "prompts.jsonl", tmp_path / "old" / "prompts.jsonl")
    keys = {"student.model": "student", "teacher.model": "teacher", "prompts.path": "prompts.jsonl"}
    values = quick(world, tmp_path / "moved") | {key: str(tmp_path / "old" / name) for key, name in keys.items()}
    stop_after(values, 2)
    (tmp_path / "old").rename(tmp_path / "new [1] é")
    (tmp_path / "moved").rename(tmp_path / "moved too")
    moved = {key: str(tmp_path / "new [1] é" / name) for key, name in keys.items()}
    run(values | moved | {"run_dir": str(tmp_path / "moved too")}, resume=True)
    ours, theirs = weights(tmp_path / "moved too"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_one_of_several_teachers_may_move_and_none_may_join(world, tmp_path):
    shutil.copytree(world / "teacher", tmp_path / "here")
    values = quick(world, tmp_path / "run", mixture__kind="loss", teachers__a__model=str(tmp_path / "here"))
    values["teachers.b.model"] = str(world / "student")
    del values["teacher.model"]
    stop_after(values, 1)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = {
        "teachers.a.model": str(tmp_path / "there"),
        "teachers.a.tokens_per_batch": 50,
        "teachers.b.dtype": "bfloat16",
    }
    with pytest.raises(RunFolderError, match=r"another recipe.*teachers.c.source: None → 'model'"):
        run(values | moved | {"teachers.c.model": str(world / "teacher")}, resume=True)
    with pytest.raises(RunFolderError, match=r"The teacher a's own weights differ"):
        run(values | moved | {"teachers.a.model": str(world / "student")}, resume=True)
    run(values | moved, resume=True)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_other_files_under_another_path_are_refused(world, tmp_path, who):
    values = quick(world, tmp_path / "run")
    stop_after(values, 1)
    shutil.copytree(world / who, tmp_path / "copy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "copy")
    tokenizer.chat_template = "{{ messages[-1]['content'] }}!"
    tokenizer.save_pretrained(tmp_path / "copy")
    with pytest.raises(RunFolderError, match=rf"{who}'s tokenizer and chat template differ"):
        run(values | {f"{who}.model": str(tmp_path / "copy")}, resume=True)


def test_a_teacher_read_in_another_dtype_is_the_same_teacher(world, tmp_path, capsys):
    """What `auto` does when a run moves between a machine with a GPU and one without."""
    values = quick(world, tmp_path / "run", log__progress="plain")
    stop_after(values, 2)
    run(values | {"teacher.dtype": "bfloat16"}, resume=True)
    assert "changed from here on: teacher.dtype: 'auto' → 'bfloat16'" in capsys.readouterr().out


def test_a_changed_rate_is_the_rate_of_the_next_step_and_stands_in_the_history(world, tmp_path):
    values = quick(world, tmp_path / "run", optimizer__name="muon", optimizer__weight_decay=0.1)
    stop_after(values, 2)
    run(values | {"optimizer.lr": 1e-4, "optimizer.weight_decay": 0.0}, resume=True)
    rates = [record.metrics["lr"] for record in read_metrics(tmp_path / "run")]
    assert rates == [3e-3, 3e-3, 1e-4, 1e-4]
    state = torch.load(tmp_path / "run" / "checkpoints" / "step-00000004" / "optimizer.pt", weights_only=True)
    assert {group["weight_decay"] for one in state for group in one["param_groups"]} == {0.0}
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in history] == [0, 2]
    assert history[1]["changed"]["optimizer.lr"] == [3e-3, 1e-4]


def test_a_warm_up_that_nobody_chose_does_not_begin_again_when_the_run_grows(world, tmp_path, capsys):
    more = {
        "log__progress": "plain",
        "optimizer__warmup_steps": None,
        "optimizer__lr": 1e-3,
        "train__prompts_per_step": 1,
    }
    values = quick(world, tmp_path / "run", **more)
    stop_after(values, 2)
    run(values | {"train.steps": 22}, resume=True)  # from the start, its warm-up would have been of 3 steps
    assert [record.metrics["lr"] for record in read_metrics(tmp_path / "run")] == [5e-4, *[1e-3] * 21]
    assert "changed from here on: train.steps: 2 → 22\n" in capsys.readouterr().out


def test_a_warm_up_that_nobody_chose_is_shorter_in_a_shorter_run(world, tmp_path, capsys):
    more = {"log__progress": "plain", "optimizer__warmup_steps": None, "optimizer__lr": 1e-3}
    values = quick(world, tmp_path / "run", train__steps=30, **more)

    class Enough(Exception):
        pass

    def stop(self: loop.StopRequest) -> None:
        if (tmp_path / "run" / "checkpoints" / "step-00000002").exists():
            raise Enough

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.StopRequest, "check", stop)
        with pytest.raises(Enough):
            run(values)
    run(values | {"train.steps": 4}, resume=True)
    assert [record.metrics["lr"] for record in read_metrics(tmp_path / "run")] == [2.5e-4, 5e-4, 1e-3, 1e-3]
    assert "optimizer.warmup_steps: 3 → 1; train.steps: 30 → 4" in capsys.readouterr().out


def test_fewer_steps_than_the_run_has_are_refused_and_as_many_end_it(world, tmp_path):
    values = quick(world, tmp_path / "run", eval__every=10)
    run(values)
    shutil.rmtree(tmp_path / "run" / "student")
    with pytest.raises(RunFolderError, match=r"has 4 steps already. Set train.steps to 4 to end it here"):
        run(values | {"train.steps": 3}, resume=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    summary = run(values | {"train.steps": 3}, resume=True)
    assert summary is not None and summary["steps"] == 3 and (tmp_path / "run" / "student").exists()


def test_what_moves_over_the_length_of_the_run_is_said(world, tmp_path, capsys):
    values = quick(world, tmp_path / "run", optimizer__schedule="cosine", log__progress="plain")
    stop_after(values, 2)
    run(values | {"train.steps": 6}, resume=True)
    assert "optimizer.schedule move over train.steps" in capsys.readouterr().out


def test_evaluations_that_measure_something_else_share_no_table(world, tmp_path, capsys):
    values = quick(world, tmp_path / "run", eval__every=1, log__progress="plain")
    stop_after(values, 2)
    first = run(values | {"eval.every": 2}, resume=True)
    assert first is not None and first.keys() >= {"student_before", "student_after", "teacher"}
    shutil.rmtree(tmp_path / "run" / "student")
    summary = run(values | {"eval.temperature": 0.5, "eval.prompts": 5, "train.steps": 6}, resume=True)
    assert summary is not None and "student_before" not in summary and summary["teacher"] and summary["steps"] == 6
    assert "evaluations measure something else from here on" in capsys.readouterr().out
    student = [r for r in read_metrics(tmp_path / "run") if r.kind == "eval" and r.who == "student"]
    assert [r.step for r in student] == [0, 1, 2, 4, 4, 5, 6]
    assert len({r.measure for r in student[:4]}) == len({r.measure for r in student[4:]}) == 1


def test_evaluation_may_be_switched_off_and_on_again(world, tmp_path):
    values = quick(world, tmp_path / "run", eval__every=1)
    stop_after(values, 1)
    assert run(values | {"eval.every": 0, "train.steps": 2}, resume=True) is not None
    assert run(values | {"train.steps": 3}, resume=True) is not None
    student = [r for r in read_metrics(tmp_path / "run") if r.kind == "eval" and r.who == "student"]
    assert [r.step for r in student] == [0, 1, 2, 3]


def test_a_checkpoint_of_before_there_were_these_fingerprints_resumes_with_the_same_recipe_alone(world, tmp_path):
    values = quick(world, tmp_path / "run")
    stop_after(values, 1)
    state = tmp_path / "run" / "checkpoints" / "step-00000001" / "state.json"
    old = json.loads(state.read_text()) | {"inputs": {"prompts": "x", "student's first weights": "y"}}
    state.write_text(json.dumps(old))
    shutil.copytree(world / "teacher", tmp_path / "teacher")
    with pytest.raises(RunFolderError, match=r"teacher.model changed, and the checkpoint .* does not say whether"):
        run(values | {"teacher.model": str(tmp_path / "teacher")}, resume=True)
    run(values, resume=True)


def failing(prompt: object, response: str) -> float:
    """A reward that fails while a file named by the environment is there."""
    if Path(os.environ["REWARD_FAILS"]).exists():
        raise ValueError("broken")
    return float(len(response))


@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_a_run_resumes_where_a_reward_ended_it(world, tmp_path, monkeypatch, where):
    """The error says so, whenever the last checkpoint was."""
    monkeypatch.setenv("REWARD_FAILS", str(tmp_path / "broken"))
    more = {"rl__weight": 1.0} if where == "training" else {"eval__every": 2}
    values = quick(world, tmp_path / "run", eval__reward="test_resume_changes:failing", checkpoint__every=0, **more)
    whole = values | {"run_dir": str(tmp_path / "whole")}
    run(whole)
    steps, evaluations = [], []
    step, evaluate = loop.StopRequest.check, loop.evaluation_due

    def break_after_two(self: loop.StopRequest) -> None:
        steps.append(1)
        if len(steps) == 2 and where == "training":
            (tmp_path / "broken").touch()
        step(self)

    def break_at_two(config: Config, version: int) -> bool:
        evaluations.append(version)
        if version == 2 and where == "evaluation":
            (tmp_path / "broken").touch()
        return evaluate(config, version)

    monkeypatch.setattr(loop.StopRequest, "check", break_after_two)
    monkeypatch.setattr(loop, "evaluation_due", break_at_two)
    with pytest.raises(DataError, match=r"broken.*a run resumes where it stopped"):
        run(values)
    (tmp_path / "broken").unlink()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    monkeypatch.setenv("REWARD_FAILS", str(tmp_path / "broken"))
    run(values, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")

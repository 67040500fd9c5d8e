"""`Distiller`: names and objects are the same run; step, evaluate, save, callbacks, threads; and errors that teach."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_resume import assert_same_run
from transformers import AutoModelForCausalLM, AutoTokenizer

import opd
from opd.config.recipe import build, merge
from opd.errors import DataError, RunFolderError
from opd.testing import digit_tokenizer, tiny_causal_lm
from worlds import first_digit, settings

SECTIONS: dict[str, Any] = {
    "rollout": {"max_new_tokens": 6},
    "train": {"steps": 4, "prompts_per_step": 6, "samples_per_prompt": 2, "tokens_per_microbatch": 60},
    "optimizer": {"lr": 3e-3, "warmup_steps": 2},
    "eval": {"every": 2, "prompts": 8},
    "checkpoint": {"every": 2},
    "log": {"progress": "off", "samples_every": 2},
}


def of_names(world: Path, run_dir: Path, **more: Any) -> opd.Distiller:
    names = {"student": world / "student", "teacher": str(world / "teacher"), "prompts": world / "prompts.jsonl"}
    return opd.Distiller(**{**names, "eval_prompts": world / "prompts.jsonl", "run_dir": run_dir, **SECTIONS, **more})


def loaded(world: Path, name: str) -> tuple[Any, Any]:
    folder = world / name
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def rows_of(world: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (world / "prompts.jsonl").read_text().splitlines()]


def of_objects(world: Path, run_dir: Path, **more: Any) -> opd.Distiller:
    rows = rows_of(world)
    objects = {
        "student": loaded(world, "student"),
        "teacher": loaded(world, "teacher"),
        "prompts": rows,
        "eval_prompts": rows,
    }
    return opd.Distiller(**{**objects, "run_dir": run_dir, **SECTIONS, **more})


def numbers(run: opd.Run) -> list[dict[str, Any]]:
    return [
        {"who": r.who, "step": r.step, **{k: v for k, v in r.metrics.items() if not k.startswith("time/")}}
        for r in run.metrics
    ]


# --- names and objects ------------------------------------------------------------------------------------------------


def test_objects_give_the_run_that_names_give(world, tmp_path):
    from datasets import Dataset

    named = of_names(world, tmp_path / "named").train()
    given = of_objects(world, tmp_path / "given").train()
    hub = Dataset.from_list(rows_of(world))
    from_dataset = of_objects(world, tmp_path / "dataset", prompts=hub, eval_prompts=hub).train()
    assert numbers(named) == numbers(given) == numbers(from_dataset)
    assert (tmp_path / "named/samples.jsonl").read_text() == (tmp_path / "given/samples.jsonl").read_text()
    one, two = (AutoModelForCausalLM.from_pretrained(run.path / "student") for run in (named, given))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert (
        AutoTokenizer.from_pretrained(given.path / "student")("12>")["input_ids"] == given.tokenizer("12>")["input_ids"]
    )


def test_a_recipe_gives_the_same_run(world, tmp_path):
    named = of_names(world, tmp_path / "named").train()
    values = settings(world, tmp_path / "recipe", train__steps=4, eval__every=2)
    recipe = opd.Distiller.from_config(build(merge({}, values))).train()
    assert numbers(named) == numbers(recipe)
    summary = opd.train(build(merge({}, values)), overwrite=True)
    assert summary is not None and recipe.summary is not None
    assert {**summary, "seconds": 0} == {**recipe.summary, "seconds": 0}


def test_sections_are_objects_dicts_or_one_word(world, tmp_path):
    words = of_names(world, tmp_path / "a", objective="forward_kl", train={"steps": 1}, eval=None)
    dicts = of_names(
        world, tmp_path / "a", objective={"divergence": "forward_kl"}, train=opd.TrainConfig(steps=1), eval=None
    )
    objects = of_names(
        world, tmp_path / "a", objective=opd.Objective(divergence="forward_kl"), train=opd.TrainConfig(steps=1), eval=None,
        student=opd.StudentConfig(model=str(world / "student")), teacher={"model": world / "teacher"},
        prompts=opd.PromptsConfig(path=str(world / "prompts.jsonl")),
    )  # fmt: skip
    assert words.config == dicts.config == objects.config


def test_texts_are_prompts(world, tmp_path):
    record = of_objects(world, tmp_path / "run", prompts=["12>", "34>"], eval_prompts=None).step()
    assert record["step"] == 0 and record["reverse_kl"] > 0


def test_a_function_is_the_reward_that_its_name_is(world, tmp_path):
    more = {"rl": {"weight": 1.0}, "eval": {"every": 2, "prompts": 8}}
    named = of_names(world, tmp_path / "named", **more, reward="worlds:first_digit").train()
    given = of_names(world, tmp_path / "given", **more, reward=first_digit).train()
    assert numbers(named) == numbers(given)
    inside = of_names(
        world, tmp_path / "inside", eval={"every": 2, "prompts": 8}, rl={"weight": 1.0, "reward": first_digit}
    ).train()
    kept = [row["reward/mean"] for row in numbers(named) if "reward/mean" in row]
    assert kept and kept == [row["reward/mean"] for row in numbers(inside) if "reward/mean" in row]


def test_adapters_on_a_model_in_memory(world, tmp_path):
    pytest.importorskip("peft")
    model, tokenizer = loaded(world, "student")
    distiller = of_objects(world, tmp_path / "run", student={"model": (model, tokenizer), "lora": {"rank": 2}})
    distiller.step()
    early = AutoModelForCausalLM.from_pretrained(distiller.save(tmp_path / "early"))
    run = distiller.train()
    final = AutoModelForCausalLM.from_pretrained(run.path / "student")
    assert type(run.student) is type(model) and run.student.num_parameters() == early.num_parameters()
    changed = [not torch.equal(a, b) for a, b in zip(early.parameters(), final.parameters(), strict=True)]
    assert any(changed), "saving early took nothing from the run"


# --- what it does -----------------------------------------------------------------------------------------------------


def test_steps_one_by_one_are_the_steps_of_a_run_and_need_no_folder(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = of_names(world, tmp_path / "run").train()
    expected = [row for row in numbers(run) if "loss" in row]
    many = {"every": 2, "prompts": 40, "samples_per_prompt": 10}  # so that two evaluations tell four steps from chance
    distiller = of_objects(world, tmp_path / "none", eval=many)
    before = distiller.evaluate()
    records = [distiller.step() for _ in range(4)]
    for record, row in zip(records, expected, strict=True):
        assert {k: v for k, v in record.items() if not k.startswith("time/")} == {
            k: v for k, v in row.items() if k != "who"
        }
    assert distiller.evaluate()["reverse_kl"] < before["reverse_kl"]
    assert not (tmp_path / "none").exists() and not (tmp_path / "runs").exists()
    with pytest.raises(opd.OpdError, match="All 4 steps are done"):
        distiller.step()


def test_it_saves_a_hugging_face_folder_and_overwrites_nothing(world, tmp_path):
    distiller = of_objects(world, tmp_path / "run")
    distiller.step()
    saved = AutoModelForCausalLM.from_pretrained(distiller.save(tmp_path / "some" / "where"))
    now = distiller.components.student.model
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), now.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "some" / "where")("1>")["input_ids"]
    with pytest.raises(RunFolderError, match="new or empty"):
        distiller.save(tmp_path / "some" / "where")


def test_a_run_says_what_came_of_it(world, tmp_path):
    run = of_objects(world, tmp_path / "run").train()
    assert run.path == tmp_path / "run" and run.summary is not None
    assert run.summary == json.loads((run.path / "summary.json").read_text())
    assert [r.step for r in run.metrics if r.kind == "step"] == [0, 1, 2, 3]
    (run.path / "report.html").unlink()
    assert run.report().read_text().startswith("<!doctype html>") or run.report().exists()
    assert yaml.safe_load((run.path / "config.yaml").read_text())["student"]["model"] == "<object Qwen3ForCausalLM>"


def test_a_callback_gets_every_record_and_may_stop_the_run(world, tmp_path):
    records: list[dict[str, float]] = []

    def watch(record: dict[str, float]) -> None:
        records.append(record)
        if record["step"] == 1:
            raise opd.Stop("that will do")

    more = {"eval": {"every": 3, "prompts": 8}, "callbacks": [watch, records.append]}
    run = of_names(world, tmp_path / "run", **more).train()
    assert [r["step"] for r in records] == [0, 0, 1, 1] and records[-1]["loss"] == run.metrics[-2].metrics["loss"]
    assert run.summary is not None and run.summary["steps"] == 2
    assert (run.path / "student" / "config.json").exists() and (run.path / "report.html").exists()
    whole = of_names(world, tmp_path / "whole", eval={"every": 3, "prompts": 8}).train()
    resumed = of_names(world, tmp_path / "run", eval={"every": 3, "prompts": 8}).train(resume=True)
    steps = [[r.metrics["loss"] for r in one.metrics if r.kind == "step"] for one in (whole, resumed)]
    assert steps[0] == steps[1]


def test_a_callback_that_fails_ends_the_run_with_what_was_trained_saved(world, tmp_path):
    def broken(record: dict[str, float]) -> None:
        raise KeyError("typo")

    with pytest.raises(DataError, match=r"The callback broken failed after step 0: KeyError: 'typo'.*raise opd\.Stop"):
        of_names(world, tmp_path / "run", callbacks=broken, checkpoint={"every": 0}).train()
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000001"]


def test_a_run_of_objects_resumes_with_the_same_objects_alone(world, tmp_path):
    of_objects(world, tmp_path / "whole").train()

    def stop(record: dict[str, float]) -> None:
        if record["step"] == 2:
            raise SystemExit

    with pytest.raises(SystemExit):
        of_objects(world, tmp_path / "run", callbacks=stop).train()
    rows = rows_of(world)
    for changed, what in (
        ({"student": loaded(world, "teacher")}, "student's starting weights"),
        ({"prompts": rows[1:]}, "prompts"),
    ):
        with pytest.raises(RunFolderError, match=what):
            of_objects(world, tmp_path / "run", **changed).train(resume=True)
    of_objects(world, tmp_path / "run").train(resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# --- another thread ---------------------------------------------------------------------------------------------------


def in_thread(work: Any) -> Any:
    """What `work()` returns or raises in a thread of its own, as in a notebook's or a web server's."""
    found: list[Any] = []

    def call() -> None:
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(timeout=120)
    assert found, "it did not come to an end"
    return found[0]


def test_it_trains_off_the_main_thread_with_a_time_limit_on_rewards(world, tmp_path):
    more = {"rl": {"weight": 1.0}, "reward": first_digit}
    there = in_thread(lambda: of_names(world, tmp_path / "there", **more).train())
    here = of_names(world, tmp_path / "here", **more).train()
    assert isinstance(there, opd.Run), there
    assert numbers(there) == numbers(here)


def test_a_reward_that_takes_too_long_is_an_opd_error_off_the_main_thread(world, tmp_path):
    def slow(prompt: opd.Prompt, response: str) -> float:
        while True:
            time.sleep(0.01)

    def train() -> opd.Run:
        inside = {"eval": {"every": 2, "prompts": 8, "reward": slow}, "reward": {"timeout": 0.2}}
        return of_names(world, tmp_path / "run", **inside).train()

    error = in_thread(train)
    assert isinstance(error, DataError) and "no answer within 0.2 s" in str(error)
    deadline = time.monotonic() + 10
    while any(thread.name == "opd reward" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the reward that took too long still runs"
        time.sleep(0.05)


# --- errors and names -------------------------------------------------------------------------------------------------


def test_what_cannot_be_used_is_refused_at_once(world, tmp_path):
    model, tokenizer = loaded(world, "student")
    bare = tiny_causal_lm(digit_tokenizer(), layers=1, hidden=16)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"student": 3}, r"student cannot be 3; give a folder or hub name"),
        ({"student": (model, "words")}, r"student=\(model, tokenizer\)"),
        ({"student": bare}, r"loaded from nowhere.*student=\(model, tokenizer\)"),
        ({"student": {"model": (model, tokenizer), "lra": 1}}, r"Unknown key 'student\.lra'"),
        ({"student": (model, tokenizer), "teacher": (model, tokenizer)}, r"very model that is trained"),
        ({"teachers": {"a": str(world / "teacher")}}, r"one of the two"),
        ({"prompts": 7}, r"prompts cannot be 7; give a file"),
        ({"prompts": [1]}, r"row 0 of .* is the number 1; a row is text"),
        ({"prompts": []}, r"has no rows"),
        ({"reward": lambda response: 1.0}, r"reward\(prompt, response\)"),
        ({"reward": "numeric_anser"}, r"Did you mean 'numeric_answer'"),
        ({"objective": "reverse"}, r"objective"),
        ({"callbacks": [3]}, r"callbacks holds 3"),
        ({"train": {"step": 3}}, r"Did you mean 'train\.steps'"),
    ]
    for change, message in wrong:
        with pytest.raises(opd.OpdError, match=message):
            _ = of_names(world, tmp_path / "run", **change).components
    with pytest.raises(opd.OpdError, match="give eval_prompts"):
        of_names(world, tmp_path / "run", eval_prompts=None).evaluate()
    with pytest.raises(opd.OpdError, match=r"recipe file is opd\.config\.recipe\.load"):
        opd.Distiller.from_config("recipe.yaml")  # pyright: ignore[reportArgumentType]


def test_splits_of_a_data_set_are_told_apart_from_a_section(world, tmp_path):
    from datasets import Dataset, DatasetDict

    data = DatasetDict(train=Dataset.from_list(rows_of(world)))
    with pytest.raises(opd.OpdError, match=r"the splits train; give one of them, e\.g\. prompts=data\['train'\]"):
        of_names(world, tmp_path / "run", prompts=data)


def test_a_distiller_trains_once(world, tmp_path):
    distiller = of_names(world, tmp_path / "run", eval_prompts=None)
    distiller.train()
    for again in (distiller.train, distiller.step):
        with pytest.raises(opd.OpdError, match="make a new Distiller"):
            again()
    begun = of_names(world, tmp_path / "run", eval_prompts=None)
    begun.step()
    with pytest.raises(opd.OpdError, match="make a new Distiller"):
        begun.train(resume=True)


def test_a_frozen_copy_of_the_student_may_teach(world, tmp_path):
    model, tokenizer = loaded(world, "student")
    teacher = (copy.deepcopy(model), tokenizer)
    record = of_names(world, tmp_path / "run", student=(model, tokenizer), teacher=teacher).step()
    assert record["reverse_kl"] == 0


def test_public_names_are_listed_and_imported_without_torch():
    code = (
        "import sys, opd; names = dir(opd); assert 'torch' not in sys.modules; "
        "import opd as o; [getattr(o, n) for n in ('Stop', 'StudentConfig', 'LoraConfig', 'OpdError')]; print(*names)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    listed = ran.stdout.split()
    assert listed == sorted(opd.__all__) and {"Distiller", "Run", "Stop", "Sampler", "Teacher", "train"} <= set(listed)
    sections = {
        f.type.removesuffix(" | None")
        for f in dataclasses.fields(opd.Config)
        if str(f.type).endswith(("Config", "Config | None"))
    }
    assert sections | {"LoraConfig", "NaturalGradientConfig"} <= set(listed)

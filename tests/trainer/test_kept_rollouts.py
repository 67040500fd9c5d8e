"""Rollouts of the student before training: drawn once, readable, trained on again and again, and never those of something else."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import opd
from opd.cli.main import main
from opd.config.recipe import build, merge
from opd.errors import CacheError, ConfigError
from opd.reporting.record import read_metrics
from opd.samplers.base import draw
from opd.samplers.kept import LINES, MANIFEST, KeptRollouts, Manifest, check_same
from opd.teachers.local import LocalTeacher
from opd.testing import digit_tokenizer, tiny_causal_lm
from opd.trainer.from_config import Given, RunComponents
from opd.trainer.keep_rollouts import advice, keep_rollouts
from opd.trainer.run import train
from worlds import make_world, settings


def recipe(world: Path, place: Path, **more: object) -> Any:
    values = {"rollout__source": "cached", "rollout__path": str(place), "rollout__batch_size": 16, "eval__every": 0}
    run_dir = Path(str(more.pop("run_dir", place.parent / "run")))
    return build(merge({}, settings(world, run_dir, **(values | more))))


def quiet(_line: str) -> None:
    pass


@pytest.fixture(scope="module")
def drawn(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rollouts of each of the 40 prompts; nobody writes in it."""
    place = tmp_path_factory.mktemp("drawn") / "rollouts"
    keep_rollouts(recipe(world, place), say=quiet)
    return place


def records(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / LINES).read_text().splitlines()]


def numbers(run_dir: Path) -> list[dict[str, float]]:
    return [
        {k: v for k, v in r.metrics.items() if not k.startswith(("time/", "teacher/cache_"))}
        for r in read_metrics(run_dir)
    ]


def test_the_file_can_be_read_and_holds_every_sample_of_every_prompt(world, drawn):
    found = records(drawn)
    assert [(r["prompt_index"], r["sample"]) for r in found] == [(i, s) for i in range(40) for s in range(2)]
    for index, record in enumerate(found):
        assert record["prompt"] == f"{index // 2 * 7919 % 10_000}>" and record["answer"] == str(index // 2)
        assert re.fullmatch(r"[\d>]*", record["response"]) and record["policy_version"] == 0
        length = len(record["response_ids"])
        assert 1 <= length <= 6 and len(record["sampler_logp"]) == len(record["reverse_kl"]) == length
        assert 0 <= record["overlap"] <= 1
    summary = Manifest.read(drawn)
    assert summary is not None
    tokens = sum(len(r["response_ids"]) for r in found)
    kl = sum(sum(r["reverse_kl"]) for r in found) / tokens
    assert summary.summary["reverse_kl"] == pytest.approx(kl) and kl > 0.1
    assert f"{summary.summary['overlap']:.2f}" in advice(summary) and "2610.11291" in advice(summary)


def test_a_step_takes_the_rollouts_of_its_prompts_and_asks_no_teacher(world, drawn, monkeypatch, tmp_path):
    asked: list[int] = []
    original = LocalTeacher._score
    monkeypatch.setattr(LocalTeacher, "_score", lambda self, r, k: (asked.append(len(r)), original(self, r, k))[1])
    parts = RunComponents(recipe(world, drawn))
    by_place = {(r["prompt_index"], r["sample"]): r for r in records(drawn)}
    for step in range(8):
        prompts = parts.schedule.take(step, 6)
        rollouts = draw(parts.sampler, prompts, 2, seed=step)
        for index, rollout in enumerate(rollouts):
            prompt, group = (
                prompts[index // 2],
                {tuple(by_place[prompts[index // 2].index, s]["response_ids"]) for s in (0, 1)},
            )
            assert rollout.prompt is prompt and rollout.response_ids in group and rollout.policy_version == 0
            assert rollout.prompt_ids == parts.renderer.prompt_ids(prompt)
        pairs = [rollouts[i : i + 2] for i in range(0, 12, 2)]
        for one, two in pairs:
            kept = sorted(by_place[one.prompt.index, s]["response_ids"] for s in (0, 1))
            assert sorted([list(one.response_ids), list(two.response_ids)]) == kept, "each sample once"
        parts.scorer.score(rollouts, step)
    assert asked == [], "the scores were kept with the rollouts"


def test_kept_rollouts_train_the_student_and_epochs_cost_no_teacher(world, drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(LocalTeacher, "_score", lambda *_: pytest.fail("a teacher was asked"))
    config = recipe(world, drawn, train__steps=20, run_dir=str(tmp_path / "run"), optimizer__lr=0.01)
    train(config)
    kl = [r["reverse_kl"] for r in numbers(tmp_path / "run")]
    assert kl[-1] < 0.7 * kl[0]
    assert all("sampler_student_gap" not in r for r in numbers(tmp_path / "run"))


def test_the_first_step_is_the_live_one_on_the_same_rollouts(world, drawn, tmp_path):
    """The student is scored by the update itself: kept rollouts and kept scores give the loss and the gradient of live ones."""
    kept = RunComponents(recipe(world, drawn))
    live = RunComponents(build(merge({}, settings(world, tmp_path / "live", eval__every=0))))
    rollouts = draw(kept.sampler, kept.schedule.take(0, 6), 2, seed=0)
    one, two = (p.student.update((s := p.scorer.score(rollouts, 0)).batches, s.objective) for p in (kept, live))
    assert {**one.metrics, "sampler_student_gap": 0} == {**two.metrics, "sampler_student_gap": 0}
    assert two.metrics["sampler_student_gap"] < 1e-5, "they were drawn from the student before training"


def test_a_run_on_kept_rollouts_resumes_bit_for_bit(world, drawn, tmp_path):
    whole = recipe(world, drawn, run_dir=str(tmp_path / "whole"))
    train(whole)

    def stop(record: dict[str, float]) -> None:
        if record["step"] == 4:
            raise KeyboardInterrupt

    part = recipe(world, drawn, run_dir=str(tmp_path / "part"))
    with pytest.raises(KeyboardInterrupt):
        opd.Distiller.from_config(part, callbacks=stop).train()
    train(part, resume=True)
    assert numbers(tmp_path / "part") == numbers(tmp_path / "whole")
    weights = [load_file(tmp_path / name / "student" / "model.safetensors") for name in ("whole", "part")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_fewer_samples_than_are_kept_come_from_all_of_them(world, drawn):
    parts = RunComponents(recipe(world, drawn, train__samples_per_prompt=1))
    prompts = parts.schedule.take(0, 40)
    seen = {
        (rollout.prompt.index, rollout.response_ids)
        for seed in range(8)
        for rollout in draw(parts.sampler, prompts, 1, seed=seed)
    }
    assert seen == {(r["prompt_index"], tuple(r["response_ids"])) for r in records(drawn)}


def stopping_after(chunks: int) -> Any:
    """A listener that interrupts the command when it has drawn one chunk more."""
    told: list[str] = []

    def say(line: str) -> None:
        told.extend([line] if re.fullmatch(r"\d+ of 40 prompts", line) else [])
        if len(told) > chunks:
            raise KeyboardInterrupt

    return say


def test_a_command_that_is_stopped_goes_on_and_ends_as_if_it_had_not_been(world, drawn, tmp_path, monkeypatch):
    place = tmp_path / "rollouts"
    config = recipe(world, place)
    for chunks in (1, 2):  # stopped in the second and in the fourth chunk
        with pytest.raises(KeyboardInterrupt):
            keep_rollouts(config, say=stopping_after(chunks))
        with open(place / LINES, "ab") as file:
            file.write(b'{"prompt_index": 99, "cut sh')
    with pytest.raises(CacheError, match=r"Not all rollouts of .* Run it again, and it goes on"):
        RunComponents(config)
    said: list[str] = []
    keep_rollouts(config, say=said.append)
    assert any(line.startswith("going on after") for line in said)
    assert (place / LINES).read_bytes() == (drawn / LINES).read_bytes()
    assert (place / MANIFEST).read_bytes() == (drawn / MANIFEST).read_bytes()
    said.clear()
    keep_rollouts(config, say=said.append)
    assert said == [f"'{place}' holds all of these rollouts already"]


def test_a_killed_command_goes_on(world, drawn, tmp_path):
    place = tmp_path / "rollouts"
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(nested(settings(world, tmp_path / "run", eval__every=0, rollout__batch_size=16)))
    )
    words = [sys.executable, "-m", "opd.cli.main", "rollouts", str(tmp_path / "recipe.yaml"), "--out", str(place)]
    running = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (place / LINES).exists() or not (place / LINES).stat().st_size:
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.001)
    os.kill(running.pid, signal.SIGKILL)
    running.wait(60)
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "initial overlap" in done.stdout and f"--rollout.path {place}" in done.stdout
    assert (place / LINES).read_bytes() == (drawn / LINES).read_bytes()


def nested(values: dict[str, object]) -> dict[str, Any]:
    return merge({}, values)


def test_the_command_ends_with_the_one_that_trains_on_the_rollouts(world, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(nested(settings(world, tmp_path / "run", eval__every=0))))
    assert main(["rollouts", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "kept"), "--train.steps", "3"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train on them: ")]
    words = line.removeprefix("train on them: opd ").split()
    assert main(words) == 0
    assert len(numbers(tmp_path / "run")) == 3


@pytest.mark.parametrize("words", [["--out"], [], ["--out", "--train.steps", "3"]])
def test_a_command_without_a_folder_is_refused(world, tmp_path, capsys, words):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(nested(settings(world, tmp_path / "run"))))
    assert main(["rollouts", str(tmp_path / "recipe.yaml"), *words]) == 1
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize("lora", [{}, {"lora": {"rank": 2}}])
def test_rollouts_are_drawn_from_python_too(tmp_path, lora):
    tokenizer = digit_tokenizer()
    student, teacher = (tiny_causal_lm(tokenizer, seed=seed, initializer_range=0.4) for seed in (1, 2))
    distiller = opd.Distiller(
        student={"model": (student, tokenizer), **lora},
        teacher=(teacher, tokenizer),
        prompts=[f"{n}>" for n in range(8)],
        rollout={"source": "cached", "path": str(tmp_path / "kept"), "max_new_tokens": 4},
        train={"steps": 4, "prompts_per_step": 4, "samples_per_prompt": 2},
        eval={"every": 0},
        optimizer={"lr": 0.01, "warmup_steps": 0},
    )
    assert 0 <= distiller.draw_rollouts()["overlap"] <= 1
    taken = [distiller.step() for _ in range(4)]
    assert all((m["teacher/cache_hits"], m["teacher/cache_misses"]) == (8, 0) for m in taken)
    assert taken[3]["reverse_kl"] < taken[0]["reverse_kl"]
    with pytest.raises(ConfigError, match="rollout="):
        opd.Distiller(student=(student, tokenizer), teacher=(teacher, tokenizer), prompts=["1>"]).draw_rollouts()


# --- rollouts of something else ---------------------------------------------------------------------------------------

OTHERS: dict[str, tuple[dict[str, object], str]] = {
    "length": ({"rollout__max_new_tokens": 5}, r"rollout\.max_new_tokens \(6 there, 5 here\)"),
    "temperature": ({"rollout__temperature": 0.9}, r"rollout\.temperature \(1\.0 there, 0\.9 here\)"),
    "top_p": ({"rollout__top_p": 0.9}, r"rollout\.top_p"),
    "top_k": ({"rollout__top_k": 4}, r"rollout\.top_k"),
    "stop": ({"rollout__stop": ["3"]}, r"rollout\.stop"),
    "fewer prompts": ({"prompts__limit": 30}, "the training prompts differ"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_rollouts_of_other_settings_are_refused(world, drawn, name):
    more, said = OTHERS[name]
    with pytest.raises(CacheError, match=said):
        RunComponents(recipe(world, drawn, **more))


def test_every_difference_is_named(drawn):
    manifest = Manifest.read(drawn)
    assert manifest is not None
    check_same(drawn, manifest, manifest.drawn_from)
    for name in manifest.drawn_from:
        with pytest.raises(CacheError, match=re.escape(name)):
            check_same(drawn, manifest, {**manifest.drawn_from, name: "another"})


def test_rollouts_of_another_student_or_other_prompts_are_refused(drawn, tmp_path):
    other = make_world(tmp_path)
    file = other / "student" / "model.safetensors"
    weights = load_file(file)
    name = "model.norm.weight"
    save_file({**weights, name: weights[name] * 1.01}, file, {"format": "pt"})
    with pytest.raises(
        CacheError, match=r"the student's starting weights differ.*opd rollouts RECIPE\.yaml --out .* --overwrite"
    ):
        RunComponents(recipe(other, drawn))
    save_file(weights, file, {"format": "pt"})
    rows = (other / "prompts.jsonl").read_text().replace('"7919>"', '"7918>"')
    (other / "prompts.jsonl").write_text(rows)
    with pytest.raises(CacheError, match="the training prompts differ"):
        RunComponents(recipe(other, drawn))


def test_more_samples_than_are_kept_are_refused(world, drawn):
    with pytest.raises(CacheError, match=r"samples_per_prompt=3, and .* holds 2 rollouts of every prompt"):
        RunComponents(recipe(world, drawn, train__samples_per_prompt=3))


def test_missing_rollouts_are_refused_with_the_command_that_draws_them(world, tmp_path):
    with pytest.raises(CacheError, match=r"Draw them first: opd rollouts RECIPE\.yaml --out"):
        RunComponents(recipe(world, tmp_path / "nothing"))


@pytest.mark.parametrize("damage", ["edited", "cut", "one line less", "no manifest", "bad manifest", "no file"])
def test_damaged_rollouts_are_refused_and_the_advice_works(world, drawn, tmp_path, damage):
    place = tmp_path / "rollouts"
    place.mkdir()
    lines, manifest = (drawn / LINES).read_bytes(), (drawn / MANIFEST).read_bytes()
    cut = {"edited": lines.replace(b'"sample": 1', b'"sample": 0', 1), "cut": lines[:-5]}
    cut["one line less"] = b"".join(lines.splitlines(keepends=True)[:-1])
    (place / LINES).write_bytes(cut.get(damage, lines))
    (place / MANIFEST).write_bytes(b"{" if damage == "bad manifest" else manifest)
    if damage in ("no manifest", "no file"):
        (place / (MANIFEST if damage == "no manifest" else LINES)).unlink()
    with pytest.raises(CacheError, match="opd rollouts RECIPE"):
        RunComponents(recipe(world, place))
    keep_rollouts(recipe(world, place), overwrite=True, say=quiet)
    assert (place / LINES).read_bytes() == lines
    RunComponents(recipe(world, place))


def test_going_on_with_another_recipe_is_refused(world, drawn):
    for more, said in (({"seed": 5}, "another seed"), ({"train__samples_per_prompt": 3}, "another samples_per_prompt")):
        with pytest.raises(CacheError, match=said):
            keep_rollouts(recipe(world, drawn, **more), say=quiet)
    with pytest.raises(CacheError, match=r"rollout\.top_k"):
        keep_rollouts(recipe(world, drawn, rollout__top_k=3), say=quiet)


def test_losses_and_rewards_that_need_live_rollouts_are_refused(world, tmp_path):
    sampled = {"objective__support": "sampled", "objective__estimator": "k1", "objective__delivery": "advantage"}
    tail = {"objective__support": "teacher_top_k", "objective__tail": "sampled"}
    for more in (sampled, tail, {"rl__weight": 1.0}, {"train__token_fraction": 0.5}, {"rollout__horizon_start": 2}):
        with pytest.raises(ConfigError, match=r"source=cached"):
            recipe(world, tmp_path / "kept", **more)
    with pytest.raises(ConfigError, match=r"rollout\.path does not say where"):
        recipe(world, tmp_path / "kept", rollout__path=None)
    with pytest.raises(ConfigError, match=r"read where rollout\.source=cached"):
        recipe(world, tmp_path / "kept", rollout__source="live")


def test_a_run_cannot_change_between_live_and_kept_rollouts(world, drawn, tmp_path):
    live = build(merge({}, settings(world, tmp_path / "run", eval__every=0, train__steps=2)))
    train(live)
    with pytest.raises(opd.OpdError, match=r"rollout\.source"):
        train(recipe(world, drawn, run_dir=str(tmp_path / "run"), train__steps=2), resume=True)


def test_a_run_on_kept_rollouts_goes_on_with_a_copy_of_them_and_not_with_others(world, drawn, tmp_path):
    run_dir = str(tmp_path / "run")
    train(recipe(world, drawn, run_dir=run_dir, train__steps=2))
    shutil.copytree(drawn, tmp_path / "copy")
    train(recipe(world, tmp_path / "copy", run_dir=run_dir, train__steps=4), resume=True)
    assert len(numbers(tmp_path / "run")) == 4
    keep_rollouts(recipe(world, tmp_path / "others", seed=1), say=quiet)
    with pytest.raises(opd.OpdError, match="The kept rollouts differ"):
        train(recipe(world, tmp_path / "others", run_dir=run_dir, train__steps=6), resume=True)


def test_a_sampler_object_beside_kept_rollouts_is_refused(world, drawn):
    parts = RunComponents(recipe(world, drawn))
    with pytest.raises(ConfigError, match="a sampler object would draw others"):
        RunComponents(recipe(world, drawn), Given(sampler=parts.sampler))


def test_two_commands_do_not_draw_into_one_folder(world, tmp_path):
    place = tmp_path / "kept"

    def say(_line: str) -> None:
        with pytest.raises(CacheError, match="Another process is drawing"):
            keep_rollouts(recipe(world, place), say=quiet)

    keep_rollouts(recipe(world, place), say=say)


def test_a_kept_sampler_reads_what_it_needs_and_not_the_whole_file(world, drawn):
    parts = RunComponents(recipe(world, drawn))
    assert isinstance(parts.sampler, KeptRollouts)
    held = parts.sampler._starts
    assert len(held) == 80 and held.itemsize == 8

"""`opd train` with a teacher behind a server: to the report, on from a checkpoint, and when the server is gone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import opd
from opd.config.recipe import build, merge
from opd.doctor.checks import served_notes
from opd.errors import DataError, RunFolderError, ServerError
from opd.reporting.record import read_metrics
from opd.testing import digit_tokenizer, tiny_causal_lm
from opd.trainer.run import train
from remote.scripted import Asked, Reply, free_port, serving
from teachers.model_server import ModelServer
from worlds import settings

TOKENIZER = digit_tokenizer()
SECRET = "sk-0123456789abcdef"


def served(world: Path, run_dir: Path, *urls: str, **more: object) -> dict[str, Any]:
    values = settings(world, run_dir, **{"train__steps": 4, "eval__every": 0, "checkpoint__every": 1} | more)
    values = {key: value for key, value in values.items() if key != "teacher.model" or "teacher__model" in more}
    return values | {"teacher.url": list(urls), "objective.support": "teacher_top_k", "objective.top_k": 4}


def model(world: Path, name: str = "teacher") -> Any:
    return AutoModelForCausalLM.from_pretrained(world / name)


def losses(run_dir: Path) -> list[float]:
    return [record.metrics["loss"] for record in read_metrics(run_dir) if "loss" in record.metrics]


def run(values: dict[str, Any], **options: bool) -> Any:
    return train(build(merge({}, values)), **options)


def test_opd_train_ends_with_a_report_and_the_key_is_nowhere(world: Path, tmp_path: Path):
    keys: list[str | None] = []

    def keyed(asked: Asked) -> Reply | None:
        keys.append(asked.headers.get("authorization"))
        return answers(asked)

    answers = ModelServer(model(world), TOKENIZER)
    with serving(keyed) as (server,):
        values = served(world, tmp_path / "run", server.url, eval__every=2, objective__tail="sampled")
        values |= {"teacher.api_key_env": "TEACHER_KEY", "log.progress": "plain"}
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(json.dumps(merge({}, values)))
        done = subprocess.run(
            [sys.executable, "-m", "opd.cli.main", "train", str(recipe)],
            capture_output=True,
            text=True,
            timeout=240,
            env={"TEACHER_KEY": SECRET, "PATH": "", "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
        )
    assert done.returncode == 0, done.stderr
    assert set(keys) == {f"Bearer {SECRET}"}
    said = done.stdout + done.stderr
    assert "evaluations report the reward alone" in said and SECRET not in said
    assert (tmp_path / "run" / "report.html").is_file() and (tmp_path / "run" / "student").is_dir()
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    for path in [tmp_path / "run" / "config.yaml"]:
        assert "api_key_env: TEACHER_KEY" in path.read_text()


def test_a_run_goes_on_with_its_teacher_at_another_address(world: Path, tmp_path: Path):
    with serving(*(ModelServer(model(world), TOKENIZER, name=name) for name in ("a", "b"))) as (one, other):
        run(served(world, tmp_path / "whole", one.url, optimizer__warmup_steps=0))
        values = served(world, tmp_path / "moved", one.url, train__steps=2, optimizer__warmup_steps=0)
        run(values)
        run(values | {"train.steps": 4, "teacher.url": [other.url], "teacher.concurrency": 2}, resume=True)
    assert losses(tmp_path / "moved") == losses(tmp_path / "whole")


def test_another_model_at_the_server_is_another_run(world: Path, tmp_path: Path):
    with serving(ModelServer(model(world), TOKENIZER), ModelServer(model(world, "student"), TOKENIZER)) as (one, other):
        values = served(world, tmp_path / "run", one.url, train__steps=2)
        run(values)
        with pytest.raises(RunFolderError, match="teacher's log-probs of a fixed text differ"):
            run(values | {"train.steps": 4, "teacher.url": [other.url]}, resume=True)
        with pytest.raises(RunFolderError, match=r"teacher\.url"):
            run(
                {k: v for k, v in values.items() if k != "teacher.url"}
                | {"train.steps": 4, "teacher.model": str(world / "teacher")},
                resume=True,
            )


def test_a_server_that_dies_ends_the_run_and_resume_goes_on(world: Path, tmp_path: Path):
    answers, alive = ModelServer(model(world), TOKENIZER), 6

    def mortal(asked: Asked) -> Reply | None:
        nonlocal alive
        alive -= asked.path == "/v1/completions"
        return answers(asked) if alive >= 0 else None

    values = served(world, tmp_path / "run", "", checkpoint__every=100, teacher__deadline=1.0, teacher__concurrency=1)
    with serving(mortal) as (server,):
        values["teacher.url"] = [server.url]
        with pytest.raises(ServerError, match=r"no usable answer.*curl http"):
            run(values)
        before = losses(tmp_path / "run")
        assert 0 < len(before) < 4
        alive = 1000
        run(values, resume=True)
        run(values | {"run_dir": str(tmp_path / "whole")})
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_teacher_with_its_own_tokenizer_and_more_to_read(world: Path, tmp_path: Path):
    with serving(ModelServer(model(world), TOKENIZER)) as (server,):
        more = {"teacher__model": str(world / "teacher"), "prompts__teacher_prompt": "{{ answer }}{{ prompt }}"}
        mine = served(world, tmp_path / "mine", server.url, **more)
        run(mine)
        asked = [one.body for one in server.asked if one.path == "/v1/completions"][-1]
        shown = tuple(f"{i}{i * 7919 % 10_000}>" for i in range(40))
        texts = ["".join(TOKENIZER.decode(row, skip_special_tokens=True).split()) for row in asked["prompt"]]
        assert texts and all(text.startswith(shown) for text in texts), texts
    theirs = {key: value for key, value in mine.items() if key != "teacher.url"}
    run(theirs | {"teacher.supply": "top_k", "run_dir": str(tmp_path / "theirs")})
    assert losses(tmp_path / "mine") == pytest.approx(losses(tmp_path / "theirs"), abs=1e-4)


def test_prompts_that_the_server_cannot_read_are_named_before_the_run(world: Path, tmp_path: Path):
    answers = ModelServer(model(world), TOKENIZER, context=10)
    with serving(answers) as (server,), pytest.raises(DataError, match=r"max_new_tokens=6 .*teacher.* is 9"):
        run(served(world, tmp_path / "run", server.url))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_server_that_is_not_there_begins_no_run(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("opd.teachers.probe.START_SECONDS", 3.0)
    with pytest.raises(ServerError, match="ConnectError"):
        run(served(world, tmp_path / "run", f"http://127.0.0.1:{free_port()}"))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_tail_that_costs_nothing_is_named(world: Path, tmp_path: Path):
    values = served(world, tmp_path, "http://127.0.0.1:1")
    assert any("tail=sampled is unbiased" in note for note in served_notes(build(merge({}, values))))
    values |= {"objective.tail": "sampled"}
    assert not any("tail=sampled" in note for note in served_notes(build(merge({}, values))))


def test_a_student_of_another_size_learns_from_it(world: Path, tmp_path: Path):
    student = tiny_causal_lm(TOKENIZER, hidden=16, layers=1, heads=2, max_positions=64, seed=4, initializer_range=0.4)
    with serving(ModelServer(model(world), TOKENIZER)) as (server,):
        distiller = opd.Distiller(
            student=(student, TOKENIZER),
            teacher={"url": server.url},
            prompts=[{"prompt": f"{n}>"} for n in range(20)],
            objective=opd.Objective(support="teacher_top_k", top_k=8, tail="sampled"),
            rollout={"max_new_tokens": 6},
            train={"steps": 30, "prompts_per_step": 8, "samples_per_prompt": 2},
            optimizer={"lr": 0.02, "warmup_steps": 0},
            eval={"every": 0},
            run_dir=tmp_path / "run",
        )
        records = [distiller.step() for _ in range(30)]
    first, last = (sum(r["reverse_kl"] for r in part) / 5 for part in (records[:5], records[-5:]))
    assert last < 0.7 * first

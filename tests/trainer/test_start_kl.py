"""The metric start_kl and its rule: what is measured, that a run stays the same beside it, and that a resumed run goes on with it."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from test_guard import QUICK, looked_at, recipe
from test_resume import assert_same_run

from opd.config.recipe import build, merge
from opd.errors import RunFolderError
from opd.reporting.record import read_metrics
from opd.samplers.base import draw
from opd.trainer import start_kl
from opd.trainer.distiller import Distiller
from opd.trainer.from_config import RunComponents
from opd.trainer.guard import Guard
from opd.trainer.run import train
from opd.trainer.start_kl import EVERY, FILE, kl_to_top, start_kl_of
from worlds import settings

ON = {"guard__start_kl__action": "warn"}


def test_the_kl_to_the_likeliest_tokens_by_pencil():
    student, start = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    whole = 0.5 * math.log(2) - 0.25 * math.log(2)
    every = torch.tensor([[1, 0, 2]])
    assert kl_to_top(student, every, start.gather(-1, every)).item() == pytest.approx(whole)
    top = torch.tensor([[1]])
    coarse = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert kl_to_top(student, top, start.gather(-1, top)).item() == pytest.approx(coarse)
    assert 0 < coarse < whole


def test_a_masked_token_adds_nothing():
    logp = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert kl_to_top(logp, torch.tensor([[0, 1, 2]]), logp).item() == 0.0


def test_it_is_the_kl_of_the_weights_as_they_are_to_those_of_the_start(world: Path, tmp_path: Path):
    parts = RunComponents(build(merge({}, settings(world, tmp_path / "run", **ON))))
    measure = start_kl_of(parts, tmp_path)
    assert measure is not None
    parts.sampler.load(parts.student)
    rollouts = draw(parts.sampler, parts.schedule.take(0, 6), 1, seed=1)
    assert measure.measure(parts.student, rollouts) == pytest.approx(0.0, abs=1e-6)
    before = copy.deepcopy(parts.student.model)
    with torch.no_grad():
        for weight in parts.student.model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    parts.student.version = EVERY - 1
    assert measure.measure(parts.student, rollouts) is None
    parts.student.version = EVERY
    size, rows = parts.teachers.vocabulary.size, []
    for one in rollouts[: start_kl.ANSWERS]:
        ids = torch.tensor([[*one.prompt_ids, *one.response_ids]])
        place = slice(len(one.prompt_ids) - 1, ids.shape[1] - 1)
        now, then = (
            model(ids).logits[0, place, :size].float().log_softmax(-1) for model in (parts.student.model, before)
        )
        rows.append((now.exp() * (now - then)).sum(-1))
    expected = torch.cat(rows).mean().item()
    assert expected > 0.01
    found = measure.measure(parts.student, draw(parts.sampler, parts.schedule.take(3, 6), 1, seed=2))
    assert found == pytest.approx(expected, rel=1e-4)
    again = start_kl_of(parts, tmp_path)
    assert again is not None and again.measure(parts.student, []) == pytest.approx(expected, rel=1e-4)
    unknown = start_kl_of(parts, tmp_path / "elsewhere")
    assert unknown is not None and unknown.measure(parts.student, rollouts) is None
    (tmp_path / FILE).write_bytes(b"cut")
    damaged = start_kl_of(parts, tmp_path)
    assert damaged is not None
    with pytest.raises(RunFolderError, match="Delete it"):
        damaged.measure(parts.student, rollouts)


def numbers(folder: Path, *left_out: str) -> list[dict[str, float]]:
    return [
        {k: v for k, v in r.metrics.items() if not k.startswith("time/") and k not in left_out}
        for r in read_metrics(folder)
    ]


def test_a_run_is_the_same_with_it_and_without_and_resumes_with_it(world: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(start_kl, "EVERY", 2)
    more = QUICK | {"train__steps": 7}
    train(build(merge({}, settings(world, tmp_path / "without", **more))))
    train(build(merge({}, settings(world, tmp_path / "whole", **more, **ON))))
    assert numbers(tmp_path / "whole", "start_kl") == numbers(tmp_path / "without")
    moved = [r.metrics.get("start_kl") for r in read_metrics(tmp_path / "whole") if r.kind == "step"]
    assert [one is None for one in moved] == [False, True] * 3 + [False]
    assert abs(moved[0] or 0.0) < 1e-6 and 0 < (moved[2] or 0.0) < (moved[6] or 0.0)
    values = settings(world, tmp_path / "run", **more, **ON)

    def crash(record: dict[str, float]) -> None:
        if record["step"] == 2:
            raise RuntimeError("the machine is gone")

    with pytest.raises(ValueError, match="the machine is gone"):
        Distiller.from_config(build(merge({}, values)), callbacks=crash).train()
    train(build(merge({}, values)), resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_the_rule_speaks_once_while_the_student_stays_away_and_only_where_it_is_on(world: Path, tmp_path: Path):
    apart = [{"start_kl": value} if step % 10 == 0 else {} for step, value in enumerate([2.9] * 20 + [3.1] * 40)]
    assert looked_at(Guard(recipe(**ON)), apart) == [(20, "start_kl")]
    assert looked_at(Guard(recipe()), apart) == []
    train(build(merge({}, settings(world, tmp_path / "off", **QUICK, train__steps=1))))
    assert not (tmp_path / "off" / FILE).exists()

"""An evaluation's line holds a value for every prompt, so that two runs can be compared prompt by prompt."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd.config.recipe import build, merge
from opd.reporting import read_metrics, read_samples
from opd.trainer.run import train
from worlds import settings


def test_every_prompt_of_an_evaluation_is_recorded_in_order(world: Path, tmp_path: Path):
    more = {"eval__samples_per_prompt": 2, "log__samples": 16, "train__steps": 3, "eval__reward": "regex:^[0-4]"}
    more["eval__extra_temperatures"] = (0.0,)
    config = build(merge({}, settings(world, tmp_path / "run", **more)))
    train(config)
    evaluations = [r for r in read_metrics(config.run_dir) if r.kind == "eval"]
    assert {r.who for r in evaluations} == {"student", "teacher"}
    for record in evaluations:
        for name in ("accuracy", "reverse_kl", "accuracy_greedy"):
            values = record.per_prompt[name]
            assert len(values) == 8
            assert sum(values) / 8 == pytest.approx(record.metrics[name], rel=1e-5)
        own = [s for s in read_samples(config.run_dir) if (s.phase, s.step, s.who) == ("eval", record.step, record.who)]
        for index in range(8):
            answers = [s for s in own if s.prompt_index == index]
            assert sum(s.reward or 0 for s in answers) / 2 == pytest.approx(record.per_prompt["accuracy"][index])
            nats = [sum(s.reverse_kl or ()) / len(s.tokens) for s in answers]
            assert sum(nats) / 2 == pytest.approx(record.per_prompt["reverse_kl"][index], rel=1e-4, abs=1e-9)

"""rollout.ahead=1: the next step's responses are drawn while a step updates, one update older and never more."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opd.config import Config
from opd.config.recipe import build, merge
from opd.errors import ConfigError, DataError, ServerError
from opd.reporting.record import read_metrics
from opd.testing import random_rollout
from opd.trainer.distiller import Distiller
from opd.trainer.draws import Draws
from opd.trainer.run import train
from worlds import settings

sys.path.insert(0, str(Path(__file__).parents[1] / "samplers"))
from fake_vllm import FakeVllm, serving

pytestmark = pytest.mark.timeout(200)
DRAW = "/inference/v1/generate"


@pytest.fixture
def server(world: Path) -> Iterator[FakeVllm]:
    with serving(str(world / "teacher")) as running:
        yield running


def recipe(world: Path, run_dir: Path, server: FakeVllm, **more: object) -> Config:
    small = {"train__steps": 5, "train__prompts_per_step": 3, "eval__every": 0, "checkpoint__every": 1}
    engine = {"rollout__engine": "vllm", "rollout__vllm__url": server.url, "rollout__ahead": 1}
    return build(merge({}, settings(world, run_dir, **(small | engine | more))))


def slowly(path: str, answer: dict[str, Any]) -> dict[str, Any]:
    time.sleep(1.0 if path == DRAW else 0.0)
    return answer


def steps_of(run_dir: Path) -> list[dict[str, float]]:
    return [r.metrics for r in read_metrics(run_dir) if r.kind == "step"]


def test_a_student_that_stands_still_learns_from_the_same_rollouts_as_without(
    world: Path, tmp_path: Path, server: FakeVllm
):
    """The same prompts, seeds and growing length limits, step by step: nothing is drawn for another step."""
    still = {"optimizer__lr": 1e-30, "rollout__horizon_start": 1, "rollout__horizon_steps": 3}
    for ahead in (0, 1):
        train(recipe(world, tmp_path / str(ahead), server, rollout__ahead=ahead, **still))
    plain, early = (
        [{k: v for k, v in step.items() if not k.startswith("time/")} for step in steps_of(tmp_path / str(ahead))]
        for ahead in (0, 1)
    )
    assert [step.pop("staleness") for step in early] == [0, 1, 1, 1, 1]
    assert len(early) == 5 and early == plain and len({step["response_length"] for step in plain}) > 1


def test_weights_change_only_between_the_rollouts_of_two_steps(world: Path, tmp_path: Path, server: FakeVllm):
    """Also where drawing takes longer than all that is done meanwhile."""
    server.tamper = slowly
    train(recipe(world, tmp_path / "run", server, optimizer__lr=1e-3, optimizer__warmup_steps=0))
    calls = [path for path, _ in server.asked if path in (DRAW, "/update_weight_version")]
    per_load, count = [], 0
    for path in calls:
        if path == DRAW:
            count += 1
        else:
            per_load.append(count)
            count = 0
    per_step = 3 * 2
    asked_first, *between = per_load
    assert asked_first == 1  # whether the server has this call
    preflight = 4
    assert [*between, count] == [preflight + 2 * per_step, per_step, per_step, per_step, 0, 0]


def test_stale_samples_are_weighed_where_the_loss_looks_at_the_token(world: Path, tmp_path: Path, server: FakeVllm):
    fast = {"optimizer__lr": 1e-3, "optimizer__warmup_steps": 0}
    sampled = {"objective__support": "sampled", "objective__estimator": "k2"}
    train(recipe(world, tmp_path / "run", server, **fast, **sampled))
    first, *later = steps_of(tmp_path / "run")
    assert first["sampler_student_gap"] < 1e-5 and first["importance/max"] == pytest.approx(1, abs=1e-4)
    assert all(step["sampler_student_gap"] > 1e-3 and step["importance/max"] != 1 for step in later)
    assert all(step["importance/effective_share"] < 1 for step in later)


def test_a_server_that_fails_while_it_draws_ahead_loses_no_step_that_was_made(
    world: Path, tmp_path: Path, server: FakeVllm, monkeypatch: Any
):
    monkeypatch.setattr("opd.samplers.vllm_server.PATIENCE_S", 0.1)
    server.die_at(DRAW, "-2")
    config = recipe(world, tmp_path / "run", server, checkpoint__every=100)
    with pytest.raises(ServerError, match="go on with --resume"):
        train(config)
    # The third step's rollouts were there when the server died over the fourth's, and its new weights did not arrive.
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    server.tamper = lambda _, answer: answer
    train(config, resume=True)
    staleness = [step["staleness"] for step in steps_of(tmp_path / "run")]
    assert staleness == [0, 1, 1, 0, 1], "a resumed run draws its first step from the newest weights"


def test_a_run_that_fails_gives_up_what_it_draws_and_starts_nothing_again(
    world: Path, tmp_path: Path, server: FakeVllm
):
    calls = []

    def reward(prompt: Any, response: str) -> float:
        calls.append(response)
        server.tamper = slowly
        raise RuntimeError("no")

    sections = {
        "rollout": {"engine": "vllm", "vllm": {"url": server.url}, "ahead": 1, "max_new_tokens": 4},
        "train": {"steps": 4, "prompts_per_step": 3, "samples_per_prompt": 2},
        "rl": {"weight": 1.0},
        "run_dir": tmp_path / "run",
    }
    models = {"student": str(world / "student"), "teacher": str(world / "teacher")}
    made = Distiller(**models, prompts=str(world / "prompts.jsonl"), reward=reward, **sections)
    began = time.monotonic()
    with pytest.raises(DataError):
        made.train()
    assert calls and time.monotonic() - began < 30
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("rollouts")]


def test_rollouts_older_than_allowed_are_refused(world: Path, tmp_path: Path, server: FakeVllm):
    draws = Draws(recipe(world, tmp_path / "run", server), SimpleNamespace(), SimpleNamespace())  # pyright: ignore[reportArgumentType]
    rollouts = [replace(random_rollout(2, 3, 9), policy_version=version) for version in (4, 5)]
    assert draws.staleness(rollouts, 5) == {"staleness": 0.5}
    for version in (6, 3):
        with pytest.raises(ServerError, match=r"rollout\.ahead=1"):
            draws.staleness(rollouts, version)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"rollout__ahead": 2}, r"must be 0 or 1, not 2"),
        ({"rollout__ahead": -1}, r"must be 0 or 1"),
        ({"rollout__engine": "hf", "rollout__vllm__url": None}, r"takes a server"),
        ({"rollout__vllm__url": None, "rollout__vllm__mode": "colocate"}, r"takes a server"),
        ({"rollout__lmbda": 0.5, "rollout__off_policy": "teacher"}, r"at the same time"),
    ],
)
def test_what_cannot_be_drawn_ahead_is_refused(
    world: Path, tmp_path: Path, server: FakeVllm, more: dict[str, Any], said: str
):
    with pytest.raises(ConfigError, match=said):
        recipe(world, tmp_path / "run", server, **more)

"""Whole runs whose rollouts come from an inference server: on-policy, evaluated by the same engine, resumed, and stopped in time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opd.config import Config
from opd.config.recipe import build, merge
from opd.errors import ConfigError, ServerError
from opd.reporting.record import read_metrics
from opd.samplers import vllm_process
from opd.testing import digit_tokenizer, save_model, tiny_causal_lm
from opd.trainer.distiller import Distiller
from opd.trainer.run import train
from worlds import settings

sys.path.insert(0, str(Path(__file__).parents[1] / "samplers"))
from fake_vllm import FakeVllm, serving

pytestmark = pytest.mark.timeout(200)


@pytest.fixture
def server(world: Path) -> Iterator[FakeVllm]:
    with serving(str(world / "teacher")) as running:
        yield running


def recipe(world: Path, run_dir: Path, server: FakeVllm, **more: object) -> Config:
    small = {
        "train__steps": 4,
        "train__prompts_per_step": 3,
        "eval__every": 2,
        "eval__prompts": 3,
        "checkpoint__every": 1,
    }
    engine = {"rollout__engine": "vllm", "rollout__vllm__url": server.url}
    return build(merge({}, settings(world, run_dir, **(small | engine | more))))


def steps_of(run_dir: Path) -> list[dict[str, float]]:
    return [r.metrics for r in read_metrics(run_dir) if r.kind == "step"]


def test_rollouts_and_evaluations_come_from_the_server_and_are_on_policy(world: Path, tmp_path: Path, server: FakeVllm):
    train(recipe(world, tmp_path / "run", server, optimizer__lr=0.03, optimizer__warmup_steps=0))
    steps = steps_of(tmp_path / "run")
    assert len(steps) == 4 and all(step["sampler_student_gap"] < 1e-5 for step in steps)
    evaluated = [r.step for r in read_metrics(tmp_path / "run") if r.kind == "eval" and r.who == "student"]
    asked = [body for path, body in server.asked if path == "/inference/v1/generate"]
    preflight, found_out = 4, 1
    assert evaluated == [0, 2, 4] and len(asked) == found_out + preflight + 4 * 3 * 2 + 3 * 3 * 1
    assert "importance/mean" not in steps[0], "an exact loss takes no weights"


def test_a_run_resumes_with_the_weights_of_its_checkpoint(world: Path, tmp_path: Path, server: FakeVllm, capsys: Any):
    train(recipe(world, tmp_path / "run", server, train__steps=2))
    whole = recipe(world, tmp_path / "run", server, train__steps=4, log__progress="plain")
    train(whole, resume=True)
    assert (
        "the same prompts, versions and optimizer as without the stop, and not the same bits" in capsys.readouterr().out
    )
    assert all(step["sampler_student_gap"] < 1e-5 for step in steps_of(tmp_path / "run"))
    train(recipe(world, tmp_path / "other", server, train__steps=4))
    prompts = [r.metrics["tokens"] for r in read_metrics(tmp_path / "run") if r.kind == "step"]
    assert prompts == [r.metrics["tokens"] for r in read_metrics(tmp_path / "other") if r.kind == "step"]


def test_rollouts_of_other_weights_stop_the_run_and_are_not_saved(world: Path, tmp_path: Path, server: FakeVllm):
    """A server that says the new version and samples from the old weights."""
    config = recipe(world, tmp_path / "run", server, optimizer__lr=0.5, optimizer__warmup_steps=0, eval__every=0)

    def ignore_from_now_on(path: str, answer: dict[str, Any]) -> Any:
        server.ignores_weights |= path == "/update_weight_version" and server.version.endswith("-0")
        return answer

    server.tamper = ignore_from_now_on
    with pytest.raises(ServerError, match=r"nats apart in the mean, more than rollout.vllm.max_gap=0.2"):
        train(config)
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved[-1] == "step-00000001", "the second update was made from wrong samples"


@pytest.mark.parametrize("when", ["sampling", "loading"])
def test_a_server_that_dies_leaves_a_checkpoint_of_every_step_that_was_made(
    world: Path, tmp_path: Path, server: FakeVllm, when: str, monkeypatch: Any
):
    monkeypatch.setattr("opd.samplers.vllm_server.PATIENCE_S", 0.1)
    config = recipe(world, tmp_path / "run", server, checkpoint__every=100, eval__every=0)
    path_of = {"sampling": "/inference/v1/generate", "loading": "/collective_rpc"}[when]
    server.die_at(path_of, "-2")
    with pytest.raises(ServerError, match="go on with --resume"):
        train(config)
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    done = 2 if when == "sampling" else 3
    assert saved == [f"step-{done:08d}"] and len(steps_of(tmp_path / "run")) == done
    server.tamper = lambda _, answer: answer
    train(config, resume=True)
    assert len(steps_of(tmp_path / "run")) == 4


def test_a_managed_server_is_started_and_stopped(world: Path, tmp_path: Path, monkeypatch: Any, capsys: Any):
    here = Path(__file__).parents[1] / "samplers"
    monkeypatch.setenv("PYTHONPATH", f"{here}:{Path(vllm_process.__file__).parents[2]}")
    started: list[Any] = []
    plain = vllm_process.ServerProcess.__init__

    def fake(self: Any, **options: Any) -> None:
        plain(self, **(options | {"module": "fake_vllm"}))
        started.append(self)

    monkeypatch.setattr(vllm_process.ServerProcess, "__init__", fake)
    values = settings(world, tmp_path / "run", train__steps=2, log__progress="plain", rollout__engine="vllm")
    train(build(merge({}, values)))
    assert "vLLM: ready at" in capsys.readouterr().out
    assert len(started) == 1 and started[0].starts == 1 and not started[0].running
    assert all(step["sampler_student_gap"] < 1e-5 for step in steps_of(tmp_path / "run"))


def test_an_adapter_s_student_arrives_merged(world: Path, tmp_path: Path, server: FakeVllm):
    train(recipe(world, tmp_path / "run", server, student__lora__rank=2, optimizer__lr=0.03, optimizer__warmup_steps=0))
    assert all(step["sampler_student_gap"] < 1e-5 for step in steps_of(tmp_path / "run"))


def test_a_loss_of_the_sampled_token_is_weighed_and_says_how_far_it_was_off(
    world: Path, tmp_path: Path, server: FakeVllm
):
    sampled = {"objective__support": "sampled", "objective__estimator": "k2", "eval__every": 0}
    train(recipe(world, tmp_path / "run", server, **sampled))
    for step in steps_of(tmp_path / "run"):
        assert step["importance/mean"] == pytest.approx(1.0, abs=1e-4) and step["importance/capped"] == 0
        assert step["importance/effective_share"] == pytest.approx(1.0, abs=1e-4) and step["sampler_student_gap"] < 1e-5


def test_from_python_steps_and_evaluations_have_the_weights_of_now(server: FakeVllm, tmp_path: Path):
    tokenizer = digit_tokenizer()
    models = [tiny_causal_lm(tokenizer, layers=1, hidden=32, seed=s, initializer_range=0.4) for s in (1, 2)]
    save_model(models[0], tokenizer, tmp_path / "model")
    server.load(str(tmp_path / "model"))
    options: dict[str, Any] = {
        "student": (models[0], tokenizer),
        "teacher": (models[1], tokenizer),
        "prompts": [{"prompt": f"{n}>", "answer": "1"} for n in range(10, 20)],
        "eval_prompts": [{"prompt": "7>", "answer": "1"}],
        "rollout": {"max_new_tokens": 5, "engine": "vllm", "vllm": {"url": server.url}},
        "train": {"steps": 4, "prompts_per_step": 3, "samples_per_prompt": 1},
        "optimizer": {"lr": 0.05, "warmup_steps": 0},
        "run_dir": tmp_path / "run",
    }
    made = Distiller(**options)
    made.evaluate()
    assert all(made.step()["sampler_student_gap"] < 1e-5 for _ in range(3))
    made.evaluate()
    assert server.version.endswith("-3")
    made.components.engine.close()
    with pytest.raises(ConfigError, match=r"takes the place of rollout\.engine"):
        Distiller(**options, sampler=made.components.sampler).step()


def test_a_variable_without_a_key_is_refused_before_anything_is_trained(world: Path, tmp_path: Path, server: FakeVllm):
    with pytest.raises(ConfigError, match=r"api_key_env=OPD_NO_SUCH_KEY, and that environment variable is not set"):
        train(recipe(world, tmp_path / "run", server, rollout__vllm__api_key_env="OPD_NO_SUCH_KEY"))
    assert not (tmp_path / "run" / "checkpoints").exists() and not server.asked

from __future__ import annotations

import math
import sys
import types

import pytest

from opd.errors import ConfigError, MissingDependencyError
from opd.reporting import RunRecorder, WandbSink, open_sinks


def test_tensorboard_holds_the_names_and_values_of_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sinks = open_sinks(["tensorboard"], tmp_path, resume_step=None)
    with RunRecorder(tmp_path, resume_step=None, sinks=sinks) as recorder:
        recorder.step(3, {"loss": 0.5, "time/step": 2.0})
        recorder.evaluation(4, "teacher", {"loss": 0.25})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {"loss": [(3, 0.5)], "time/step": [(3, 2.0)], "eval/teacher/loss": [(4, 0.25)]}


def test_tensorboard_hides_what_a_resumed_run_repeats(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_step, steps, value in ((None, range(4), 1.0), (2, range(2, 4), 2.0)):
        (sink,) = open_sinks(["tensorboard"], tmp_path, resume_step=resume_step)
        for step in steps:
            sink.step(step, {"loss": value})
        sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0)]


@pytest.mark.parametrize(
    ("sink", "module"), [("tensorboard", "tensorboard.summary.writer.event_file_writer"), ("wandb", "wandb")]
)
def test_a_sink_that_is_not_installed_names_its_extra(tmp_path, monkeypatch, sink, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'opd\[{sink}\]'"):
        open_sinks([sink], tmp_path, resume_step=None)


def test_an_unknown_sink_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="'mlflow'"):
        open_sinks(["mlflow"], tmp_path, resume_step=None)


class FakeRun:
    id = "abc123"

    def __init__(self) -> None:
        self.logged: list[dict] = []
        self.finished = False

    def define_metric(self, *_: str, **__: str) -> None: ...

    def log(self, values: dict) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in that remembers how it was started and what it was told."""
    module = types.ModuleType("wandb")
    module.run, module.started = FakeRun(), []  # type: ignore[attr-defined]

    def init(**arguments):
        module.started.append(arguments)
        return module.run

    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_the_step_and_only_finite_values(tmp_path, wandb):
    sink = WandbSink(tmp_path / "run", resume_step=None, project="p", config={"top_k": 64})
    sink.step(2, {"loss": 0.5, "broken": math.nan})
    sink.evaluation(3, "student", {"accuracy": 1.0})
    sink.close()
    assert wandb.run.logged == [{"loss": 0.5, "step": 2}, {"eval/student/accuracy": 1.0, "step": 3}]
    assert wandb.run.finished
    assert {key: wandb.started[0][key] for key in ("project", "name", "config", "id", "resume")} == {
        "project": "p",
        "name": "run",
        "config": {"top_k": 64},
        "id": None,
        "resume": None,
    }


def test_a_resumed_run_goes_on_in_the_same_wandb_run_and_a_new_one_does_not(tmp_path, wandb):
    WandbSink(tmp_path, resume_step=None)
    WandbSink(tmp_path, resume_step=5)
    WandbSink(tmp_path, resume_step=None)
    assert [(start["id"], start["resume"]) for start in wandb.started] == [
        (None, None),
        ("abc123", "allow"),
        (None, None),
    ]

from __future__ import annotations

import math
import sys
import types

import pytest

from opd.errors import ConfigError, MissingDependencyError
from opd.reporting import RunRecorder, WandbSink, open_sinks
from opd.reporting.record import SampleRecord


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


def sample(step: int, response: str, **more) -> SampleRecord:
    values = {
        "phase": "train",
        "who": "student",
        "prompt": "2|3",
        "tokens": ["a", "b"],
        "reverse_kl": [0.5, 1.5],
        "finished": True,
    }
    return SampleRecord(step=step, response=response, **{**values, **more})


def test_tensorboard_gets_sampled_answers_as_tables_and_the_recipe_as_hparams(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    sinks = open_sinks(
        ["tensorboard"], tmp_path, resume_step=None, config={"optimizer": {"lr": 0.5}, "stop": [1], "n": None}
    )
    with RunRecorder(tmp_path, resume_step=None, sinks=sinks) as recorder:
        for one in (sample(0, "<b>1</b>\nx"), sample(0, "y", reward=1.0), sample(3, "z")):
            recorder.sample(one)
        recorder.sample(sample(4, "eval", phase="eval", who="teacher"))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["tensors"])[1:] == ["samples/eval/teacher", "samples/train/student"]
    first, second = ((e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors("samples/train/student"))
    assert (first[0], second[0]) == (0, 3)
    assert first[1].splitlines()[2:] == [
        r"| 2\|3 | &lt;b&gt;1&lt;/b&gt;<br>x |  |  | 1 | True |",
        r"| 2\|3 | y |  | 1 | 1 | True |",
    ]
    written = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    hparams = written.session_start_info.hparams
    assert (hparams["optimizer.lr"].number_value, hparams["stop"].string_value, hparams["n"].string_value) == (
        0.5,
        "[1]",
        "None",
    )


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
    module.Table = lambda columns, data: [dict(zip(columns, row, strict=True)) for row in data]  # type: ignore[attr-defined]
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


def test_wandb_gets_one_table_of_the_answers_of_a_step(tmp_path, wandb):
    sink = WandbSink(tmp_path / "run", resume_step=None)
    for one in (sample(0, "x"), sample(0, "y", reward=1.0), sample(5, "z", reverse_kl=None)):
        sink.sample(one)
    assert [entry["step"] for entry in wandb.run.logged] == [0]
    sink.close()
    first, second = wandb.run.logged
    assert [
        (row["response"], row["reward"], row["mean reverse KL (nats)"]) for row in first["samples/train/student"]
    ] == [
        ("x", None, 1.0),
        ("y", 1.0, 1.0),
    ]
    assert second["step"] == 5 and second["samples/train/student"][0]["mean reverse KL (nats)"] is None


def test_a_resumed_run_goes_on_in_the_same_wandb_run_and_a_new_one_does_not(tmp_path, wandb):
    WandbSink(tmp_path, resume_step=None)
    WandbSink(tmp_path, resume_step=5)
    WandbSink(tmp_path, resume_step=None)
    assert [(start["id"], start["resume"]) for start in wandb.started] == [
        (None, None),
        ("abc123", "allow"),
        (None, None),
    ]

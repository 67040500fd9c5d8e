from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opd.errors import RunFolderError
from opd.reporting import MetricsRecord, RunRecorder, SampleRecord, read_metrics, read_samples


def sample(step: int, phase: str = "train", **changes) -> SampleRecord:
    values = {"who": "student", "prompt": "p", "response": "ab", "tokens": ("a", "b"), "finished": True}
    return SampleRecord(**{"step": step, "phase": phase, "reverse_kl": (0.5, 0.25), **values, **changes})


def write_run(run: Path, steps: int) -> None:
    """An evaluation at 0, then updates, each followed by an evaluation, as the trainer orders them."""
    with RunRecorder(run, resume_step=None) as recorder:
        recorder.evaluation(0, "student", {"accuracy": 0.0})
        recorder.sample(sample(0, "eval"))
        for step in range(steps):
            recorder.step(step, {"loss": 1.0 / (step + 1)})
            recorder.sample(sample(step))
            recorder.evaluation(step + 1, "student", {"accuracy": step / steps})
            recorder.sample(sample(step + 1, "eval"))


def test_records_come_back_as_they_were_written(tmp_path):
    record = sample(3, answer="é\u2028\n", reward=0.5, finished=False, source="teacher")
    with RunRecorder(tmp_path, resume_step=None) as recorder:
        recorder.step(0, {"loss": 0.1, "time/step": 2})
        recorder.evaluation(1, "teacher", {"accuracy": 0.5}, {"accuracy": (0.25, 0.75)})
        recorder.sample(record)
    assert read_metrics(tmp_path) == [
        MetricsRecord(kind="step", step=0, metrics={"loss": 0.1, "time/step": 2.0}),
        MetricsRecord(
            kind="eval", step=1, who="teacher", metrics={"accuracy": 0.5}, intervals={"accuracy": (0.25, 0.75)}
        ),
    ]
    assert read_samples(tmp_path) == [record]


def test_lines_follow_the_documented_schema(tmp_path):
    with RunRecorder(tmp_path, resume_step=None) as recorder:
        recorder.step(7, {"loss": 0.5})
        recorder.evaluation(8, "student", {"accuracy": 1.0}, {"accuracy": (0.9, 1.0)})
        recorder.sample(sample(7))
    step, evaluation = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines())
    assert step == {"schema_version": 1, "kind": "step", "step": 7, "metrics": {"loss": 0.5}}
    assert evaluation == {
        "schema_version": 1,
        "kind": "eval",
        "step": 8,
        "who": "student",
        "metrics": {"accuracy": 1.0},
        "intervals": {"accuracy": [0.9, 1.0]},
    }
    assert json.loads((tmp_path / "samples.jsonl").read_text("utf-8")) == {
        "schema_version": 1,
        "step": 7,
        "phase": "train",
        "who": "student",
        "prompt": "p",
        "answer": None,
        "response": "ab",
        "tokens": ["a", "b"],
        "reverse_kl": [0.5, 0.25],
        "reward": None,
        "finished": True,
        "source": "student",
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_are_valid_json_and_come_back_as_nan(tmp_path, value):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    with RunRecorder(tmp_path, resume_step=None) as recorder:
        recorder.step(0, {"loss": value})
        recorder.sample(sample(0, reverse_kl=None))
        recorder.sample(sample(1, reverse_kl=(value, 1.0)))
    for name in ("metrics.jsonl", "samples.jsonl"):
        for line in (tmp_path / name).read_text("utf-8").splitlines():
            json.loads(line, parse_constant=refuse)
    assert math.isnan(read_metrics(tmp_path)[0].metrics["loss"])
    unscored, scored = read_samples(tmp_path)
    assert unscored.reverse_kl is None
    assert scored.reverse_kl is not None and math.isnan(scored.reverse_kl[0]) and scored.reverse_kl[1] == 1.0


def test_a_lone_surrogate_in_a_token_survives(tmp_path):
    with RunRecorder(tmp_path, resume_step=None) as recorder:
        recorder.sample(sample(0, tokens=("\ud800", "é"), response="\ud800é"))
    assert read_samples(tmp_path)[0].tokens == ("\ud800", "é")
    assert "é" in (tmp_path / "samples.jsonl").read_text("utf-8"), "readable without a JSON parser"


def test_a_line_is_in_the_file_as_soon_as_it_is_recorded(tmp_path):
    recorder = RunRecorder(tmp_path, resume_step=None)
    recorder.step(0, {"loss": 1.0})
    assert [record.step for record in read_metrics(tmp_path)] == [0]
    recorder.close()


def test_a_line_cut_at_any_byte_leaves_the_others_readable(tmp_path):
    write_run(tmp_path, 1)
    for name, read in (("metrics.jsonl", read_metrics), ("samples.jsonl", read_samples)):
        whole = (tmp_path / name).read_bytes()
        records = read(tmp_path)
        start_of_last = whole.rindex(b"\n", 0, len(whole) - 1) + 1
        for end in range(start_of_last, len(whole) - 1):
            (tmp_path / name).write_bytes(whole[:end])
            assert read(tmp_path) == records[:-1]
        (tmp_path / name).write_bytes(whole[:-1])
        assert read(tmp_path) == records, "only the newline is missing: nothing was lost"


def test_garbage_after_the_last_line_does_not_break_reading(tmp_path):
    write_run(tmp_path, 1)
    before = read_metrics(tmp_path)
    with (tmp_path / "metrics.jsonl").open("ab") as stream:
        stream.write(b'{"kind":"st\xff\x00\x00')
    assert read_metrics(tmp_path) == before


def test_damage_before_the_last_line_is_refused_with_its_line_number(tmp_path):
    write_run(tmp_path, 2)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines()
    lines[1] = lines[1][:20]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    with pytest.raises(RunFolderError, match=r"Line 2 of .*metrics\.jsonl.*Delete"):
        read_metrics(tmp_path)


def test_a_line_of_another_schema_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"schema_version":2,"kind":"step","step":0,"metrics":{}}\n', "utf-8")
    with pytest.raises(RunFolderError, match="schema_version 2"):
        read_metrics(tmp_path)


def test_a_line_without_its_fields_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"schema_version":1,"kind":"step","step":0}\n', "utf-8")
    with pytest.raises(RunFolderError, match="metrics"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("resume_step", range(5))
def test_resuming_keeps_exactly_what_the_checkpoint_had_seen(tmp_path, resume_step):
    interrupted, uninterrupted = tmp_path / "interrupted", tmp_path / "uninterrupted"
    write_run(interrupted, 4)
    write_run(uninterrupted, resume_step)
    RunRecorder(interrupted, resume_step=resume_step).close()
    metrics, samples = read_metrics(interrupted), read_samples(interrupted)
    assert [r.step for r in metrics if r.kind == "step"] == list(range(resume_step))
    assert [r.step for r in metrics if r.kind == "eval"] == list(range(resume_step + 1))
    assert [r.step for r in samples if r.phase == "train"] == list(range(resume_step))
    assert [r.step for r in samples if r.phase == "eval"] == list(range(resume_step + 1))
    assert (interrupted / "samples.jsonl").read_bytes() == (uninterrupted / "samples.jsonl").read_bytes()


def test_a_killed_and_resumed_run_has_the_files_of_an_uninterrupted_one(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    write_run(whole, 4)
    write_run(killed, 4)
    for name in ("metrics.jsonl", "samples.jsonl"):
        content = (killed / name).read_bytes()
        (killed / name).write_bytes(content[:-17])
    with RunRecorder(killed, resume_step=2) as recorder:
        for step in (2, 3):
            recorder.step(step, {"loss": 1.0 / (step + 1)})
            recorder.sample(sample(step))
            recorder.evaluation(step + 1, "student", {"accuracy": step / 4})
            recorder.sample(sample(step + 1, "eval"))
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_resuming_completes_a_line_that_lacks_only_its_newline(tmp_path):
    write_run(tmp_path, 2)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    RunRecorder(tmp_path, resume_step=2).close()
    assert path.read_bytes() == whole


def test_a_failed_resume_leaves_the_old_file_whole(tmp_path, monkeypatch):
    write_run(tmp_path, 2)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFolderError, match="No space left"):
        RunRecorder(tmp_path, resume_step=1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_a_new_run_refuses_a_folder_that_holds_another(tmp_path):
    write_run(tmp_path, 1)
    with pytest.raises(RunFolderError, match="already holds"):
        RunRecorder(tmp_path, resume_step=None)


def test_an_empty_run_can_be_started_again(tmp_path):
    RunRecorder(tmp_path, resume_step=None).close()
    RunRecorder(tmp_path, resume_step=None).close()
    assert read_metrics(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_says_what_why_and_what_to_do(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    recorder = RunRecorder(tmp_path, resume_step=None)
    with pytest.raises(
        RunFolderError, match=r"Cannot write .*metrics\.jsonl: No space left on device\. Free some space"
    ):
        recorder.step(0, {"loss": 1.0})
    recorder.close()


@pytest.mark.skipif(sys.platform == "win32", reason="needs file size limits")
def test_a_line_that_does_not_fit_is_rolled_back(tmp_path):
    program = """
import resource, sys
from opd.errors import RunFolderError
from opd.reporting import RunRecorder
recorder = RunRecorder(sys.argv[1], resume_step=None)
recorder.step(0, {"loss": 1.0})
size = recorder.run_dir.joinpath("metrics.jsonl").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))
try:
    recorder.step(1, {"loss": 2.0})
except RunFolderError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
recorder.step(2, {"loss": 3.0})
"""
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True, text=True, timeout=60
    )
    assert "Free some space" in result.stdout
    assert [record.step for record in read_metrics(tmp_path)] == [0, 2]
    assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == 2


def test_a_run_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="create the run folder"):
        RunRecorder(tmp_path / "file" / "run", resume_step=None)


def test_every_sink_hears_what_the_log_records(tmp_path):
    heard: list[object] = []

    class Sink:
        def step(self, step, metrics):
            heard.append((step, metrics))

        def evaluation(self, step, who, metrics):
            heard.append((step, who, metrics))

        def close(self):
            heard.append("closed")

    with RunRecorder(tmp_path, resume_step=None, sinks=[Sink()]) as recorder:
        recorder.step(0, {"loss": 1.0})
        recorder.evaluation(1, "teacher", {"accuracy": 0.5})
    assert heard == [(0, {"loss": 1.0}), (1, "teacher", {"accuracy": 0.5}), "closed"]


def test_reporting_never_imports_torch():
    program = """
import importlib, pkgutil, sys
import opd.reporting
for module in pkgutil.iter_modules(opd.reporting.__path__):
    importlib.import_module(f"opd.reporting.{module.name}")
for name in opd.reporting.__all__:
    getattr(opd.reporting, name)
heavy = {"torch", "transformers", "tensorboard", "wandb"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_row_of_a_prompt_is_kept_and_may_be_missing_in_older_files(tmp_path):
    with RunRecorder(tmp_path, resume_step=None) as recorder:
        recorder.sample(sample(0, prompt_index=3))
        recorder.sample(sample(0))
    assert [found.prompt_index for found in read_samples(tmp_path)] == [3, None]

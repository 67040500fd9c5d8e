"""The sink for Trackio writes a project that Trackio itself reads back."""

import json
import math
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trackio")

SCRIPT = """
import math, sys
from opd.reporting.record import SampleRecord
from opd.reporting.sinks import open_sinks

def opened(resume):
    (sink,) = open_sinks(["trackio"], sys.argv[1], resume_step=resume, projects={"trackio": "mine"}, config={"train": {"steps": 2}})
    return sink

sink = opened(None)
sink.step(0, {"loss": 0.5, "broken": math.nan})
sink.evaluation(0, "student", {"accuracy": 0.25})
sink.close()
sink = opened(1)
sink.step(1, {"loss": 0.25})
sink.close()
"""


@pytest.fixture
def logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, sqlite3.Connection]:
    """What a process printed that logged a run and went on with it, and Trackio's own database."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = tmp_path / "runs" / "first"
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(run)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, sqlite3.connect(tmp_path / "trackio" / "mine.db")


def test_steps_and_evaluations_are_there_under_the_name_of_the_folder_also_after_resuming(logged):
    printed, database = logged
    rows = [
        (run, step, json.loads(values))
        for run, step, values in database.execute("select run_name, step, metrics from metrics order by id")
    ]
    assert rows == [
        ("first", 0, {"loss": 0.5}),
        ("first", 0, {"eval/student/accuracy": 0.25}),
        ("first", 1, {"loss": 0.25}),
    ]
    assert printed == ""
    assert not any(math.isnan(value) for _, _, values in rows for value in values.values())


def test_the_recipe_is_the_config_of_the_run(logged):
    _, database = logged
    ((config,),) = database.execute("select config from configs").fetchall()
    assert json.loads(config)["train"] == {"steps": 2}

"""`opd doctor` as a command: exit codes, the table, the JSON document, and what it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from doctor.pairs import answering, write_pair
from opd.cli.main import main
from opd.config.recipe import merge


def recipe(folder: Path, *tables: Any, **more: Any) -> str:
    values = write_pair(folder, *tables, **more)
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(merge({}, values)))
    return str(path)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return recipe(tmp_path_factory.mktemp("healthy"), answering(0.4), answering(0.95))


def test_the_machine_alone_needs_no_recipe(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "Python" in out and "alignment" not in out and out.rstrip().endswith("3 green")


def test_the_json_document_is_all_that_goes_to_stdout(healthy: str):
    done = subprocess.run(
        [sys.executable, "-m", "opd.cli.main", "doctor", healthy, "--json", "--prompts", "12", "--log.progress=plain"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    document = json.loads(done.stdout)
    assert (
        document["verdict"] in ("green", "yellow") and done.returncode == {"green": 0, "yellow": 1}[document["verdict"]]
    )
    assert "loading student" in done.stderr
    found = {check["name"]: check for check in document["checks"]}
    assert found["start/task"]["numbers"]["prompts"] == 12
    assert not [name for name, check in found.items() if check["verdict"] == "red"]


def test_an_override_reaches_the_checks_and_a_red_one_exits_with_two(healthy: str, capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", healthy, "--rollout.max_new_tokens", "1"]) == 2
    out = capsys.readouterr().out
    assert "red start/lengths: Answers are cut off at" in out and "mend: rollout.max_new_tokens: 4" in out


def test_a_yellow_check_exits_with_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", recipe(tmp_path, answering(0.6), answering(0.6))]) == 1
    out = capsys.readouterr().out
    assert "yellow start/task" in out and not any(line.startswith("red ") for line in out.splitlines())


def test_a_misspelt_key_is_a_red_recipe(healthy: str, capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", healthy, "--json", "--train.stepz", "3"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["checks"][-1]["name"] == "recipe" and "stepz" in document["checks"][-1]["seen"]


def test_nothing_is_written(healthy: str, capsys: pytest.CaptureFixture[str]):
    folder = Path(healthy).parent
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    main(["doctor", healthy, "--prompts", "4", "--teacher.cache", str(folder / "cache")])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert "start/task" in capsys.readouterr().out

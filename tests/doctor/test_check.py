"""The doctor's verdicts, exit codes, table and JSON document."""

from __future__ import annotations

import io
import json

import pytest

from doctor.pairs import answering, by_name, config_of, write_pair
from opd.doctor.check import Check, Verdict, exit_code, failed, run_checks, skipped, worst
from opd.doctor.machine import check_machine, needed_packages
from opd.doctor.shown import as_json, show_table
from opd.errors import ModelError


def of(verdict: Verdict, name: str = "one", **more: object) -> Check:
    return Check(name=name, verdict=verdict, seen="It was looked at.", **more)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        ([], 0),
        (["green", "skipped"], 0),
        (["green", "yellow", "skipped"], 1),
        (["red", "yellow", "green"], 2),
        (["yellow", "red"], 2),
    ],
)
def test_the_worst_verdict_decides_the_exit_code(verdicts: list[Verdict], code: int):
    assert exit_code([of(verdict) for verdict in verdicts]) == code


def test_a_check_that_raises_is_red_and_stops_no_other():
    def broken() -> list[Check]:
        raise ZeroDivisionError("by nothing")

    def refused() -> list[Check]:
        raise ModelError("The model has no head. Give another one.")

    found = run_checks({"a": broken, "b": refused, "c": lambda: [of("green", "c")]})
    assert [(check.name, check.verdict) for check in found] == [("a", "red"), ("b", "red"), ("c", "green")]
    assert found[0].seen == "ZeroDivisionError: by nothing"
    assert found[1].seen == "The model has no head. Give another one."


def test_a_skipped_check_is_not_worse_than_a_green_one():
    assert worst([skipped("a", "There is nothing to look at."), of("green")]) == "green"


def test_the_table_says_the_verdict_and_what_to_do_without_colour():
    stream = io.StringIO()
    checks = [
        of("green", numbers={"KL": (0.5, 0.25, 0.75), "rows": 3}),
        of("red", "two", why="It hurts.", mend="train.steps: 1", details=("prompt 3: '[bold]a\x1b[2J'",)),
    ]
    show_table(checks, stream)
    text = stream.getvalue()
    assert "KL 0.5 [0.25, 0.75], rows 3" in text
    assert "red two: It was looked at." in text and "why: It hurts." in text and "mend: train.steps: 1" in text
    assert "[bold]a\\x1b[2J" in text and "\x1b" not in text
    assert text.rstrip().endswith("1 green, 1 red")


def test_the_json_document_has_null_for_what_is_not_finite():
    checks = [failed("a", ModelError("no")), of("green", numbers={"x": float("nan"), "y": (1.0, float("-inf"), 2.0)})]
    document = json.loads(as_json(checks, "recipe.yaml"))
    assert document["verdict"] == "red" and document["recipe"] == "recipe.yaml"
    assert document["checks"][1]["numbers"] == {"x": None, "y": [1.0, None, 2.0]}


def test_the_machine_alone_is_versions_devices_and_disk():
    found = by_name(check_machine())
    assert list(found) == ["machine", "devices", "disk"]
    assert found["machine"].numbers["torch"] and float(str(found["disk"].numbers["free GiB"])) > 0


def test_a_device_and_a_package_that_are_not_here_are_red(tmp_path, monkeypatch):
    values = write_pair(tmp_path, answering(), answering(), teacher__device="cuda:7", log__wandb_project="x")
    config = config_of(values)
    assert needed_packages(config).keys() == {"wandb"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = by_name(check_machine(config))
    assert found["devices"].verdict == "red" and "teacher.device=cuda:7" in found["devices"].seen
    assert found["packages"].verdict == "red" and found["packages"].mend == "pip install 'opd[wandb]'"

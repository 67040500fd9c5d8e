"""`opd demo`: what a newcomer sees first, run as they run it."""

from __future__ import annotations

import json
import os
import random
import shlex
import subprocess
import sys

import pytest

from opd.cli.main import main
from opd.demo.prepare import MAX_POSITIONS
from opd.demo.recipe import recipe_path
from opd.demo.task import DIGITS, WRONG, draw, spoil
from opd.testing import digit_tokenizer, save_model, tiny_causal_lm


def demo(folder, *arguments: str, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "opd.cli.main", "demo", *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=timeout, env={**os.environ, "CI": "1"}
    )


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder in which a newcomer has run the demo, and what it said."""
    folder = tmp_path_factory.mktemp("desk")
    return folder, demo(folder, timeout=800)


@pytest.mark.endurance
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_ends_with_the_student_within_five_points_of_its_teacher(desk):
    folder, result = desk
    assert result.returncode == 0, result.stderr
    summary = json.loads((folder / "runs/demo/summary.json").read_text())
    before, after, teacher = (summary[who] for who in ("student_before", "student_after", "teacher"))
    assert teacher["accuracy"] > 0.95
    assert before["accuracy"] < 0.05
    assert after["accuracy"] > teacher["accuracy"] - 0.05
    assert before["accuracy_t0.5"] < 0.5 and before["accuracy_greedy"] < 0.6, "sharpening the base must not be enough"
    for row in (before, after, teacher):
        low, high = row["interval"]
        assert low <= row["accuracy"] <= high and high - low < 0.1
    assert after["reverse_kl"] < 0.05 * before["reverse_kl"]
    assert summary["seconds"] > 0
    page = (folder / "runs/demo/report.html").read_text()
    assert f"{100 * after['accuracy']:.1f}%" in page
    for row in ("student before", "student after", "teacher"):
        assert row in result.stdout


@pytest.mark.endurance
@pytest.mark.slow
def test_the_demo_trains_with_the_recipe_in_the_repository(desk):
    """It leaves the config of recipes/demo with the places filled in, keeps its run unless it is told otherwise, and keeps its models."""
    folder, _ = desk
    assert "divergence: reverse_kl" in (folder / "runs/demo/config.yaml").read_text()
    assert "divergence: reverse_kl" in recipe_path().read_text()
    again = demo(folder)
    assert again.returncode == 1 and "already holds a run" in again.stderr and "--overwrite" in again.stderr
    short = demo(folder, "--train.steps", "2", "--eval.every", "0", "--log.progress", "off", "--overwrite")
    assert short.returncode == 0 and "kept from an earlier run" in short.stdout


def test_a_rule_that_stops_the_demo_ends_it_with_code_three_and_the_command_that_goes_on(tmp_path, capsys, monkeypatch):
    """Models that know nothing stand where an earlier demo would have left its own, and never end their answers."""
    monkeypatch.chdir(tmp_path)
    tokenizer = digit_tokenizer()
    for name in ("teacher", "base"):
        model = tiny_causal_lm(tokenizer, max_positions=MAX_POSITIONS, hidden=32, layers=1, seed=len(name))
        save_model(model, tokenizer, tmp_path / "here" / name)
    quick = ["--train.steps", "4", "--eval.every", "0", "--run_dir", "here", "--log.progress", "off"]
    rule = [
        "--guard.truncated.action",
        "stop",
        "--guard.truncated.patience",
        "1",
        "--guard.truncated.threshold",
        "0.01",
    ]
    words = [*quick, *rule]
    assert main(["demo", *words]) == 3
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("stopped by guard.truncated: ")
    command = shlex.split(last.partition("Continue with: ")[2])
    assert command == ["opd", "demo", *words, "--resume"]
    assert main([*command[1:], "--guard.truncated.action", "off"]) == 0


def test_spoiling_hits_each_digit_with_its_own_probability():
    generator = random.Random(0)
    for digit, wrong in enumerate(WRONG):
        spoilt = spoil(str(digit) * 4000, generator)
        share = sum(c != str(digit) for c in spoilt) / 4000
        assert share == pytest.approx(wrong, abs=0.03)


def test_answers_are_the_sorted_digits():
    prompt, answer = draw(random.Random(1))
    assert len(prompt) == DIGITS + 1 and sorted(prompt[:-1]) == list(answer)

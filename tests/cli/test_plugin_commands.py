"""`opd doctor verl` and `opd verl smoke`, as far as they get without verl."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from opd.cli.main import main

needs_no_verl = pytest.mark.skipif(importlib.util.find_spec("verl") is not None, reason="verl is installed here")


@needs_no_verl
def test_the_doctor_says_how_to_install_verl():
    done = subprocess.run(
        [sys.executable, "-m", "opd.cli.main", "doctor", "verl"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stdout == "FAIL  verl is not installed: pip install 'opd[verl]'\n"
    assert done.stderr == ""


@needs_no_verl
def test_a_dry_run_says_how_to_install_verl(capsys: pytest.CaptureFixture[str]):
    assert main(["verl", "smoke", "data.train_batch_size=4"]) == 1
    assert capsys.readouterr().err == "error: verl is not installed in this environment; pip install 'opd[verl]'.\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["doctor", "trl"], "'trl' is no recipe and no plugin: opd doctor [RECIPE.yaml]"),
        (["doctor", "--train.steps", "3"], "Give the recipe first: opd doctor [RECIPE.yaml]"),
        (["doctor", "recipe.yaml", "--prompts", "many"], "--prompts takes a number of prompts, not 'many'"),
        (["doctor", "recipe.yaml", "--prompts=0"], "--prompts takes a number of prompts, not '0'"),
        (["verl"], "There are two commands here: opd verl smoke"),
        (["verl", "train"], "There are two commands here: opd verl smoke"),
        (["verl", "smoke"], "Give your verl overrides"),
        (["verl", "smoke", "--steps", "two", "a=1"], "--steps takes a number, not 'two'"),
        (["verl", "smoke", "--steps"], "--steps takes a number, not ''"),
        (["verl", "smoke", "--steps=1.5", "a=1"], "--steps takes a number, not '1.5'"),
        (["verl", "smoke", "--steps=0", "a=1"], "--steps=0 must be above 0"),
        (["verl", "smoke", "--timeout", "nan", "a=1"], "--timeout=nan must be above 0"),
    ],
)
def test_a_wrong_command_line_is_explained(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main(words) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert said in captured.err


@pytest.mark.parametrize(("words", "said"), [(["doctor"], "opd doctor verl"), (["verl"], "--timeout SECONDS")])
def test_help_is_given(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main([*words, "--help"]) == 0
    assert said in capsys.readouterr().out

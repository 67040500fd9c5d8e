"""`opd compare` on the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opd.cli.defaults import recipe_defaults
from opd.cli.main import main
from opd.config.recipe import build, to_dict
from opd.reporting import RunRecorder
from opd.reporting.runs import flat
from reporting.compare_inputs import write_compared


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two runs in tmp_path, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    write_compared(tmp_path / "one", right=(0, 0, 0, 1))
    write_compared(tmp_path / "two", right=(0, 1, 1, 1), optimizer__lr=1e-4)
    return ["one", "two"]


def test_it_prints_the_tables_and_writes_a_page_again_and_again(runs: list[str], capsys: pytest.CaptureFixture[str]):
    for _ in range(2):
        assert main(["compare", *runs]) == 0
    said = capsys.readouterr().out
    assert "+50.0 [−16.6, +83.2] points" in said and said.endswith("page: compare.html\n")
    assert "<h1>one and two</h1>" in Path("compare.html").read_text()


def test_a_file_that_opd_did_not_write_is_kept(runs: list[str], capsys: pytest.CaptureFixture[str]):
    Path("mine.html").write_text("<p>mine")
    assert main(["compare", *runs, "--out", "mine.html"]) == 1
    assert capsys.readouterr().err == (
        "error: mine.html is there already, and opd compare did not write it. Give another place with --out FILE.\n"
    )
    assert Path("mine.html").read_text() == "<p>mine"
    assert main(["compare", *runs, "--out=new/page.html"]) == 0 and Path("new/page.html").exists()


def test_a_report_of_a_run_is_not_overwritten_either(runs: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["report", "one"]) == 0
    assert main(["compare", *runs, "--out", "one/report.html"]) == 1
    assert "opd compare did not write it" in capsys.readouterr().err


def test_escape_codes_in_recipes_names_and_metrics_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    bad = "\x1b]0;title\x07\x1b[2J\u202e[bold]"
    one = write_compared(tmp_path / "one", eval__reward=bad, **{f"optimizer__{bad}": bad})
    two = write_compared(tmp_path / f"two{bad}", measure="m2")
    with RunRecorder(two, resume_step=4) as recorder:
        recorder.evaluation(4, "student", {"accuracy": 1.0, f"accuracy_{bad}": 1.0}, measure="m2")
    assert main(["compare", str(one), str(two), "--out", str(tmp_path / "page.html")]) == 0
    said = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\u202e"} & set(said)
    assert said.count("[bold]") > 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no run was given"),
        (["one"], "'one' has nothing to be compared with"),
        (["one", "three"], "three does not exist"),
        (["one", "./one"], "are the same folder"),
        (["one", "two", "--out"], "--out needs a file"),
        (["one", "two", "--out", "."], "is a folder"),
        (["one", "two", "--plot"], "no option '--plot'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_1(
    runs: list[str], capsys: pytest.CaptureFixture[str], words: list[str], said: str
):
    assert main(["compare", *words]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not Path("compare.html").exists()


def test_help_names_the_command_and_its_options(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0 and "opd compare RUN RUN" in capsys.readouterr().out
    assert main(["compare", "--help"]) == 0 and "--open" in capsys.readouterr().out


def test_it_needs_no_torch(runs: list[str]):
    code = "import sys; from opd.cli.main import main; main(['compare', 'one', 'two']); print(sorted({'torch', 'pydantic', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_open_shows_the_page_in_the_browser(runs: list[str], tmp_path: Path):
    words = [sys.executable, "-m", "opd.cli.main", "compare", *runs, "--open"]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=60, env={**os.environ, "BROWSER": "/bin/echo shown %s"}
    )
    assert done.returncode == 0, done.stderr
    assert f"shown {(tmp_path / 'compare.html').resolve().as_uri()}" in done.stdout


def test_defaults_read_from_the_source_are_those_of_a_recipe():
    recipe = {"student": {"model": "s"}, "teacher": {"model": "t"}, "prompts": {"path": "p"}}
    real = flat(to_dict(build(recipe)))
    read = recipe_defaults()
    given = {"student.model", "teacher.model", "prompts.path"}
    mappings = {key for key, value in real.items() if value == {}}
    assert real.keys() - read.keys() - given == mappings
    wrong = {key: (real[key], read[key]) for key in real.keys() & read.keys() if real[key] != read[key]}
    assert {key for key, (now, default) in wrong.items() if default is not None} <= given

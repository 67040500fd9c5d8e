"""`opd completion` and `opd train --help SECTION`: what shells offer is what commands take, and a section's help is a part of the whole."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from desks import MAX_CPU_S, TIMEOUT_S, answered, check_refusal
from opd.cli.completion import SHELLS, WITHOUT_TABLE, options_of, takes_keys
from opd.cli.help_section import section_names
from opd.cli.main import COMMANDS, main
from opd.config.recipe import whole_keys

HELP_CPU_S = 5.0  # 1.8 on an idle machine, most of it tyro


def offered(tmp_path: Path, *words: str) -> list[str]:
    """What bash itself would offer for the last of these words, through the script."""
    script = tmp_path / "opd.bash"
    if not script.exists():
        script.write_text(answered(tmp_path, "completion", "bash").out)
    line = " ".join(f"'{word}'" for word in ("opd", *words))
    asked = f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words)}; _opd; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, timeout=TIMEOUT_S, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_bash_offers_commands_options_and_keys(tmp_path: Path):
    assert set(offered(tmp_path, "")) == {*COMMANDS, "--help", "--version"}
    assert offered(tmp_path, "sa") == ["sample"]
    assert offered(tmp_path, "eval", "run", "--te") == ["--teacher", "--temperature", "--teacher-too", *_keys("te")]
    assert offered(tmp_path, "train", "r.yaml", "--optimizer.l") == _keys("optimizer.l") != []
    assert offered(tmp_path, "runs", "--optimizer.l") == []
    assert offered(tmp_path, "completion", "") == ["--help", "--debug", *SHELLS]
    assert offered(tmp_path, "eval", "ru") == []  # files, by the shell itself


def _keys(beginning: str) -> list[str]:
    return [f"--{key}" for key in whole_keys() if key.startswith(beginning) and ".NAME." not in key]


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_and_option_is_in_the_script(capsys: pytest.CaptureFixture[str], shell: str):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for name in COMMANDS:
        assert re.search(rf"\b{name}\b", script)
        for option in options_of(name):
            assert option.name.removeprefix("--") in script
    for key in whole_keys():
        assert key in script or ".NAME." in key


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_reads_its_script(tmp_path: Path, shell: str):
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not on this machine")
    script = tmp_path / "script"
    script.write_text(answered(tmp_path, "completion", shell).out)
    done = subprocess.run([program, "-n", str(script)], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "serve-teacher"])
def test_the_help_of_a_command_names_every_option_that_is_offered(capsys: pytest.CaptureFixture[str], name: str):
    assert main([name, "--help"]) == 0
    told = capsys.readouterr().out
    for option in options_of(name):
        assert option.name in told
    assert ("--section.key" in told or "--optimizer.lr" in told) is takes_keys(name)


@pytest.mark.parametrize("name", WITHOUT_TABLE)
def test_every_option_of_a_usage_line_is_offered(capsys: pytest.CaptureFixture[str], name: str):
    assert main([name, "--help"]) == 0
    usage = capsys.readouterr().out.splitlines()[0]
    named = set(re.findall(r"--[a-z][a-z-]+(?![a-z.-])", usage)) - {"--debug", "--section"}
    assert named <= set(WITHOUT_TABLE[name])


def test_the_help_lists_every_command_once_in_groups(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    told = capsys.readouterr().out.splitlines()
    groups = [line for line in told if re.fullmatch(r"[a-z ]+:", line)]
    assert groups == ["before a run:", "train:", "look at runs:", "use a model:", "this shell:"]
    for name, text in COMMANDS.items():
        assert [line for line in told if line.split() and line.split()[0] == name and line.endswith(text)]
    assert all(len(line) <= 125 for line in told)


@pytest.mark.parametrize("section", ["optimizer", "rollout.vllm", "student.lora", "eval"])
def test_the_help_of_a_section_has_its_keys_alone(capsys: pytest.CaptureFixture[str], section: str):
    assert main(["train", "--help", section]) == 0
    told = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    keys = set(re.findall(r"(?<= --)([a-z][\w.-]*\.[\w-]+)", told))
    expected = {key.replace("_", "-") for key in whole_keys() if key.startswith(f"{section}.")}
    assert keys == expected
    assert "All sections: opd train --help" in told


def test_sections_of_several_teachers_are_those_of_one(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "--help", "teachers.math"]) == 0
    assert "--teacher.model" in capsys.readouterr().out
    assert "teachers" not in section_names()


def test_the_help_of_a_section_needs_no_torch(tmp_path: Path):
    answer = answered(tmp_path, "train", "--help", "optimizer")
    assert (answer.last, answer.err) == ("code 0 heavy", "")
    assert answer.cpu_s < HELP_CPU_S


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["train", "--help", "optimiser"],
            "A recipe has no section 'optimiser'. Did you mean 'optimizer'? Sections: student,",
        ),
        (["demo", "--help", "max_new_tokens"], "'max_new_tokens' is a key of rollout."),
        (
            ["train", "--help", "optimizer.lr"],
            "'optimizer.lr' is a key of the section optimizer; see opd train --help optimizer.",
        ),
        (["completion"], "Give one shell, bash, zsh, fish."),
        (["completion", "fsh"], "Did you mean 'fish'?"),
        (["evla", "x"], "opd has no command 'evla'. Did you mean 'eval'?"),
    ],
)
def test_a_wrong_word_is_refused(tmp_path: Path, words: list[str], said: str):
    if words[0] in COMMANDS and words[0] == "completion":
        check_refusal(tmp_path, words, said)
        return
    answer = answered(tmp_path, *words)
    assert said in answer.err and answer.last in ("code 1 heavy", "code 2 heavy")
    assert answer.cpu_s < (MAX_CPU_S if words[0] == "evla" else HELP_CPU_S)


def test_completion_is_an_ordinary_command_line(tmp_path: Path):
    """The words of the advice, followed to the letter, in a shell that reads the script through a pipe."""
    opd = tmp_path / "opd"
    opd.write_text(f'#!/bin/sh\nexec {sys.executable} -m opd.cli.main "$@"\n')
    opd.chmod(0o755)
    words = "source <(opd completion bash); complete -p opd"
    done = subprocess.run(
        ["bash", "-c", f"PATH={tmp_path}:$PATH; {words}"], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert (done.stdout, done.stderr) == ("complete -o default -F _opd opd\n", "")

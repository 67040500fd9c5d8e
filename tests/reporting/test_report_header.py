"""The head of a report tells one run from another, and says how far it is."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest
import yaml
from report_inputs import write_run

from opd.reporting import write_report
from opd.reporting.about import About, State, read_state, write_about, write_state
from opd.reporting.configuration import configuration
from opd.reporting.header import header, moment, spelled, standing

ABOUT = About(
    student="Qwen3-0.6B",
    teacher="Qwen3-8B",
    objective="reverse KL, whole vocabulary",
    data="gsm8k, 7,473 prompts",
    device="H100",
    started="2026-11-27T13:51:00+00:00",
    command="opd train recipe.yaml",
    commit="bf6f2291b2c3d4e5f60718293a4b5c6d7e8f9012+",
    versions={"opd": "0.1.0", "torch": "2.9.1"},
)


@pytest.mark.parametrize(
    ("name", "why", "said"),
    [
        ("loading", "", "loading"),
        ("running", "", "running, step 5 of 30"),
        ("finished", "", "finished, 5 steps"),
        ("stopped", "the reward fell", "stopped after step 5 of 30: the reward fell"),
        ("failed", "the loss is NaN", "failed at step 5 of 30: the loss is NaN"),
    ],
)
def test_the_state_of_a_run_in_words(name, why, said):
    state = State(name=name, step=5, steps=30, why=why, host=socket.gethostname(), pid=os.getpid())
    assert standing(state).text == said
    assert standing(state).mood == {"loading": "going", "running": "going", "finished": "good"}.get(name, "bad")


def test_a_run_whose_process_is_gone_ended_without_a_word():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait(timeout=60)
    state = State(name="running", step=7, steps=30, host=socket.gethostname(), pid=process.pid)
    assert standing(state).text == "ended without a word after step 7 of 30"


def test_the_page_says_what_the_run_is_and_what_differs_from_the_defaults(tmp_path):
    run = write_run(tmp_path / "run", summary=False)
    write_about(run, ABOUT)
    write_state(run, "running", 4, 30)
    (run / "config.yaml").write_text(
        "student: {model: s}\nteacher: {model: t}\nprompts: {path: p.jsonl}\ntrain:\n  steps: 30\n  prompts_per_step: 64\n"
    )
    page = write_report(run).read_text("utf-8")
    for words in (
        "Qwen3-0.6B</span>",
        "Qwen3-8B</span>",
        "reverse KL, whole vocabulary",
        "gsm8k, 7,473 prompts",
        "H100",
        "27 Nov 2026, 13:51 UTC",
        "opd 0.1.0, torch 2.9.1",
        "bf6f2291b2c3 with changes that are not committed",
        "opd train recipe.yaml",
        "running, step 4 of 30",
        "<mark>  steps: 30</mark>",
    ):
        assert words in page
    assert "summary.json" not in page and "has not ended" not in page
    assert "<mark>  prompts_per_step: 64</mark>" not in page
    assert '<script type="application/json" id="state">{"name":"running","step":4,"steps":30' in page


def test_a_run_of_an_older_version_says_what_its_configuration_knows():
    head = header(None, None, {"student": {"model": "a"}, "teacher": {"model": "b"}, "prompts": {"path": "p"}})
    assert (head.student, head.teacher, head.facts, head.standing) == ("a", "b", (("data", "p"),), None)
    assert header(None, None, {"teachers": {"maths": {}, "code": {}}}).teacher == "maths + code"
    assert header(None, None, {}).facts == ()


def test_a_run_that_has_only_begun_to_load_has_a_page(tmp_path):
    write_state(tmp_path, "loading", 0, 30)
    page = write_report(tmp_path).read_text("utf-8")
    assert "loading" in page and "recorded nothing yet" in page
    assert read_state(tmp_path) is not None


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (43, "43 s"), (70, "1 min 10 s"), (3765, "1 h 2 min"), (float("nan"), "—")]
)
def test_durations_have_units(seconds, said):
    assert spelled(seconds) == said


def test_a_moment_that_is_no_date_stays_as_it_is():
    assert moment("yesterday") == "yesterday"
    assert moment("2026-11-27T13:51:00Z") == "27 Nov 2026, 13:51 UTC"
    assert moment(0.0) == "1 Jan 1970, 00:00 UTC"
    assert moment(1e300) == "1e+300"


CONFIG = """student:
  model: s
  lora:
    rank: 8
teacher:
  model: t
prompts:
  path: p.jsonl
objective:
  divergence: reverse_kl
optimizer:
  name: adamw
  lr: {lr}
  betas:
  - 0.9
  - 0.95
train:
  steps: 7
run_dir: runs/x
seed: 0
"""


def test_keys_that_differ_from_the_defaults_are_found():
    from opd.config.recipe import build, to_dict

    default_lr = to_dict(
        build(
            {"student": {"model": "s", "lora": {"rank": 8}}, "teacher": {"model": "t"}, "prompts": {"path": "p.jsonl"}}
        )
    )["optimizer"]["lr"]
    text = CONFIG.format(lr=yaml.safe_dump(default_lr).split()[0])
    found = configuration(text)
    changed = {key.key: (key.value, key.default) for key in found.changed}
    assert {"student.model", "teacher.model", "prompts.path", "train.steps"} <= set(changed)
    assert (
        changed["train.steps"] == ("7", "100")
        and changed["student.lora"] == ("present", "none")
        and changed["student.model"] == ("s", "")
    )
    assert {"optimizer.lr", "optimizer.betas", "optimizer.name", "seed", "run_dir", "objective.divergence"}.isdisjoint(
        changed
    )
    other = configuration(CONFIG.format(lr=0.5))
    assert {key.key: key.default for key in other.changed}["optimizer.lr"] in text
    assert [line.text for line in found.lines if line.changed] == [
        "  model: s",
        "  lora:",
        "    rank: 8",
        "  model: t",
        "  path: p.jsonl",
        "  steps: 7",
    ]
    assert "\n".join(line.text for line in found.lines) + "\n" == text


@pytest.mark.parametrize(
    "text", ["a: [", "- 1\n- 2\n", "", "unknown: {key: 1}\nstudent: 3\n", "optimizer:\n  lr: word\n"]
)
def test_a_configuration_that_this_version_cannot_read_is_shown_as_it_is(text):
    assert [line.text for line in configuration(text).lines] == text.splitlines()


def test_marking_a_configuration_takes_little_time():
    configuration(CONFIG.format(lr=0.5))
    began = time.process_time()
    configuration(CONFIG.format(lr=0.5))
    assert time.process_time() - began < 0.5

"""The rules of opd.guard over what verl's driver has of each step: recorded metrics, patience, words, and going on."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from opd.config import Config
from opd.config.guard import GuardConfig
from opd.config.sections import all_keys, parse_section
from opd.errors import ConfigError, RunFolderError
from opd.integrations.verl.plugin.checks import RunFacts, check_run, remarks
from opd.integrations.verl.plugin.recipe_keys import in_verl_words
from opd.integrations.verl.plugin.settings import parse
from opd.integrations.verl.plugin.step_guard import STATE_FILE, StepGuard, stopping, told, watched
from opd.reporting.guarded import read_onsets
from opd.trainer.guard_advice import CAUSES

RECORDED = {
    "actor/opd/loss": 0.9,
    "actor/loss": 1.1,
    "actor/opd/reverse_kl": 1.064,
    "actor/opd/student_entropy": 2.5,
    "actor/opd/teacher_entropy": 2.4,
    "actor/opd/eos_prob": 0.01,
    "actor/opd/clamped": 0.0,
    "actor/opd/truncated": 0.25,
    "actor/opd/repetition": 0.02,
    "actor/opd/response_length": 11.5,
    "actor/opd/sampler_student_gap": 1e-7,
    "actor/pg_clipfrac": 0.0,
    "actor/opd/reverse_kl_at/0-15": 1.064,
    "timing_s/step": 3.0,
}
"""Names that a real run of verl 0.9.1 logs."""


def guard(run_dir: Path | None = None, **rules: Any) -> StepGuard:
    config = parse_section(GuardConfig, {"first_steps": 2, **rules})
    return StepGuard(config, None if run_dir is None else str(run_dir))


def looks(
    guarded: StepGuard, steps: int, first: int = 1, score: float | None = 0.5, **changed: float
) -> list[list[str]]:
    """The rules that begin, step by step, with these metrics of `actor/opd/`."""
    metrics = RECORDED | {f"actor/opd/{name}": value for name, value in changed.items()}
    return [[one.rule for one in guarded.look(step, metrics, score)] for step in range(first, first + steps)]


@pytest.mark.parametrize(
    ("rule", "changed"),
    [
        ("truncated", {"truncated": 0.9}),
        ("repetition", {"repetition": 0.5}),
        ("length", {"response_length": 60.0}),
        ("eos_prob", {"eos_prob": 0.0005}),
        ("entropy", {"student_entropy": 0.3}),
        ("sampler_gap", {"sampler_student_gap": 0.3}),
        ("clipped", {"clamped": 0.4}),
    ],
)
def test_a_rule_reads_verls_metrics_and_acts_after_its_patience(rule: str, changed: dict[str, float]):
    guarded = guard(**{rule: {"patience": 3}})
    assert looks(guarded, 2) == [[], []]
    assert looks(guarded, 4, first=3, **changed) == [[], [], [rule], []]
    assert guarded.onsets[0].step == 4  # a record's steps count from 0


def test_the_loss_is_the_one_that_was_trained_and_clipping_is_that_of_the_policy_loss():
    metrics = watched({**RECORDED, "actor/pg_clipfrac": 0.5}, 0.25)
    assert (metrics["loss"], metrics["clipped"], metrics["reward/mean"]) == (1.1, 0.5, 0.25)
    assert "reward/mean" not in watched(RECORDED, None)
    assert "truncated" not in watched({"actor/opd/truncated": math.nan}, None)


def test_a_rewards_fall_is_seen_while_the_kl_falls():
    guarded = guard(reward={"patience": 1})
    found = [
        guarded.look(step, RECORDED | {"actor/opd/reverse_kl": 2.0 - step / 50}, 1.0 - step / 60)
        for step in range(1, 41)
    ]
    assert [one.rule for began in found for one in began] == ["reward"]


def test_what_is_said_has_verls_keys(tmp_path: Path):
    guarded = guard(tmp_path, truncated={"patience": 1, "action": "stop"})
    onset = stopping(guarded.look(1, RECORDED | {"actor/opd/truncated": 1.0}, None))
    assert onset is not None
    assert told(1, onset) == (
        "opd: warning: step 1: opd.guard.truncated: 100% of the responses are cut off, and opd.guard.truncated.threshold=0.75 has been "
        "passed. The likeliest causes: the limit is too low for the task (raise data.max_response_length); cut responses teach the "
        "student not to end (raise data.max_response_length); responses go on after what was asked for (a new run with prompts that ask "
        "for short answers)."
    )
    assert guarded.last_values("truncated") == " The last values of truncated: 1."
    assert guarded.last_values("clipped") == ""
    assert read_onsets(tmp_path) == [onset]


def test_no_folder_is_made_for_the_report_of_another_machine(tmp_path: Path):
    guarded = guard(tmp_path / "elsewhere", truncated={"patience": 1})
    assert guarded.look(1, RECORDED | {"actor/opd/truncated": 1.0})
    assert not (tmp_path / "elsewhere").exists()


def test_no_advice_names_a_key_that_verl_does_not_have():
    """A recipe's keys are those of Config; of them verl has what begins with opd. alone."""
    keys = "|".join(re.escape(key) for key in sorted(all_keys(Config), key=len, reverse=True) if "." in key)
    for causes in CAUSES.values():
        for cause in causes:
            words = in_verl_words(cause)
            assert not re.findall(rf"(?<![\w.])(?:{keys})\b", words), words


@pytest.mark.parametrize(
    "words", ["opd.guard.length.threshold", "my_guard.length", "config/guard.length", "a.teacher.model"]
)
def test_a_key_is_prefixed_where_it_begins_alone(words: str):
    assert in_verl_words(words) == words
    assert in_verl_words("raise guard.length.threshold") == "raise opd.guard.length.threshold"


def test_a_resumed_run_goes_on_with_the_rules_as_they_stood(tmp_path: Path):
    rules = {"truncated": {"patience": 3}, "repetition": {"patience": 1, "action": "stop"}}
    whole, before = guard(**rules), guard(**rules)
    looks(whole, 2), looks(before, 2)
    for guarded in (whole, before):
        looks(guarded, 2, first=3, truncated=0.9)
    before.save(tmp_path)
    after = guard(**rules)
    after.load(tmp_path)
    assert looks(after, 2, first=5, truncated=0.9) == looks(whole, 2, first=5, truncated=0.9) == [["truncated"], []]
    assert after.steps == whole.steps
    looks(after, 1, first=7, repetition=0.9)
    after.save(tmp_path)
    again = guard(**rules)
    again.load(tmp_path)
    assert looks(again, 1, first=8, repetition=0.9) == [
        ["repetition"]
    ]  # it stopped the run, and has its patience again
    assert [one.rule for one in again.onsets] == ["truncated", "repetition", "repetition"]


def test_a_checkpoint_without_rules_begins_anew_and_a_damaged_one_says_what_to_do(tmp_path: Path):
    guarded = guard()
    guarded.load(tmp_path)
    assert guarded.steps == []
    (tmp_path / STATE_FILE).write_text("{")
    with pytest.raises(RunFolderError, match="Delete it"):
        guarded.load(tmp_path)
    (tmp_path / STATE_FILE).unlink()
    guarded.load(tmp_path)


def settings(**rules: Any):
    return parse({"teacher": {"model": "teacher"}, "guard": rules})[0]


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"truncatd": {}}, "opd.guard.truncated"),
        ({"length": {"treshold": 1}}, "opd.guard.length.threshold"),
        ({"length": {"threshold": -1}}, "opd.guard.length.threshold|opd.guard.threshold"),
        ({"length": {"action": "drop"}}, "opd.guard.length.action"),
        ({"truncated": {"action": "drop"}}, "opd.guard.truncated.action=drop: .* Use warn or stop"),
    ],
)
def test_keys_are_checked_by_the_names_of_verls_command_line(rules: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        settings(**rules)


@pytest.mark.parametrize(
    ("facts", "advice"),
    [
        ({"trainer_mode": "separate_async"}, {"trainer_mode": "opd_separate_async"}),
        ({"trainer_mode": "my_trainer"}, {"trainer_mode": "opd_sync"}),
        ({"use_v1": False}, {"use_v1": True}),
    ],
)
def test_a_trainer_that_does_not_look_is_told_and_refused_where_a_rule_would_stop(
    facts: dict[str, Any], advice: dict[str, Any]
):
    warns, stops = settings(), settings(length={"action": "stop"})
    run = RunFacts(strategy="fsdp2", **facts)
    check_run(warns, run)
    (said,) = remarks(warns, run)
    assert said.startswith("warning: ")
    with pytest.raises(ConfigError, match=r"opd\.guard\.length\.action=stop would never stop this run") as caught:
        check_run(stops, run)
    ((key, value),) = advice.items()
    assert (
        f"trainer.{'v1.' if key == 'trainer_mode' else ''}{key}={str(value).lower() if value is True else value}"
        in str(caught.value)
    )
    mended = RunFacts(strategy="fsdp2", **advice)
    check_run(stops, mended)
    assert remarks(stops, mended) == ()


def test_a_run_without_rules_may_have_any_trainer():
    off = settings(**{name: {"action": "off"} for name in GuardConfig().rules})
    assert remarks(off, RunFacts(strategy="fsdp2", trainer_mode="sync")) == ()

"""The doctor's checks of a verl command line: healthy models are green, injected faults are not, and each says which files it read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_smoke_config import CLUSTER
from transformers import AutoConfig, AutoTokenizer
from verl_world import REWARD, make_near_pair, make_prompts

from opd.cli.main import main
from opd.cli.verl_doctor import examine_words
from opd.doctor.check import Check, exit_code
from opd.testing import CHAT_TEMPLATE, byte_tokenizer, digit_tokenizer, save_model, tiny_causal_lm

LONG = {"vocab_size": 300, "max_positions": 16384}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a teacher that is near it, and teachers with a fault each."""
    folder = tmp_path_factory.mktemp("doctor")
    tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
    make_near_pair(folder)
    shutil.copytree(folder / "teacher", folder / "template")
    byte_tokenizer(chat_template=CHAT_TEMPLATE.replace("<|", "<").replace("|>", ">")).save_pretrained(
        folder / "template"
    )
    uniform = tiny_causal_lm(tokenizer, architecture="llama", seed=2, **LONG)
    save_model(uniform, tokenizer, folder / "uniform")
    other = digit_tokenizer(extra="\n", chat_template=CHAT_TEMPLATE)
    save_model(tiny_causal_lm(other, architecture="llama", max_positions=16384), other, folder / "vocabulary")
    AutoConfig.from_pretrained(folder / "teacher").save_pretrained(folder / "no weights")
    AutoTokenizer.from_pretrained(folder / "teacher").save_pretrained(folder / "no weights")
    make_prompts(folder / "train.parquet", rows=2048)
    (folder / "reward.py").write_text(REWARD)
    return folder


def words(world: Path, teacher: str = "teacher", *more: str) -> list[str]:
    return [
        *CLUSTER,
        f"opd.teacher.model={world}/{teacher}",
        f"actor_rollout_ref.model.path={world}/student",
        f"data.train_files={world}/train.parquet",
        f"reward.custom_reward_function.path={world}/reward.py",
        *more,
    ]


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {one.name: one for one in checks}


def test_a_healthy_pair_is_green_and_its_own_files_were_read(world: Path):
    checks = by_name(examine_words(words(world)))
    assert exit_code(list(checks.values())) == 0
    for name in ("prompts", "length", "vocabulary", "template", "alignment", "stop mass", "start/distance", "memory"):
        assert checks[name].verdict == "green", checks[name]
    assert "weights, config and tokenizer" in checks["files"].seen and f"'{world}/teacher'" in checks["files"].seen
    assert "the prompts are yours" in checks["files"].seen
    assert checks["start/lengths"].verdict == "skipped"  # answers of 8192 tokens are cut here
    assert checks["prompt length"].numbers["longest prompt"] == 32
    parameters = sum(p.numel() for p in tiny_causal_lm(byte_tokenizer(), architecture="llama", **LONG).parameters())
    assert checks["memory"].numbers["student GiB per GPU"] == pytest.approx(16 * parameters / 32 / 2**30)


@pytest.mark.parametrize(
    ("teacher", "check", "verdict", "said"),
    [
        ("vocabulary", "vocabulary", "red", "do not read the same token ids"),
        ("uniform", "alignment", "red", "The teacher's scores are uniform"),
        ("template", "template", "yellow", "differently from token 1 on: "),
    ],
)
def test_an_injected_fault_is_found(world: Path, teacher: str, check: str, verdict: str, said: str):
    checks = examine_words(words(world, teacher))
    found = by_name(checks)[check]
    assert found.verdict == verdict and said in found.seen, found
    assert exit_code(checks) == {"red": 2, "yellow": 1}[verdict]
    names = [one.name for one in checks]
    assert {n for n in names if names.count(n) > 1} <= {"size", "prompts"}, "a row for each model, and for each note"
    told = " ".join(one.mend for one in checks)
    assert "rollout.lmbda" not in told and " teacher.model" not in f" {told}".replace("opd.teacher.model", "")


def test_without_weights_only_what_needs_none_is_said(world: Path):
    checks = by_name(examine_words(words(world, "no weights")))
    assert "config and tokenizer alone" in checks["files"].seen
    assert checks["vocabulary"].verdict == checks["template"].verdict == "green"
    assert checks["alignment"].verdict == checks["start"].verdict == "skipped"
    assert "not in a folder of this machine" in checks["alignment"].seen


def test_models_that_are_elsewhere_are_named_and_nothing_is_said_of_them():
    checks = examine_words(CLUSTER)
    assert {one.verdict for one in checks} == {"skipped"}
    assert "teacher '/nfs/teacher'" in checks[0].seen and "student '/nfs/student'" in checks[0].seen
    assert exit_code(checks) == 0


def test_made_up_prompts_are_told(world: Path):
    checks = by_name(examine_words(words(world, "no weights", "data.train_files=/nfs/train.parquet")))
    assert "the prompts are made-up sums" in checks["files"].seen
    assert "prompt length" not in checks


def test_prompts_longer_than_verl_takes_are_told_with_the_key_that_mends_it(world: Path):
    checks = by_name(examine_words(words(world, "no weights", "data.max_prompt_length=16")))
    assert (checks["prompt length"].verdict, checks["prompt length"].mend) == ("yellow", "data.max_prompt_length=32")
    again = by_name(examine_words(words(world, "no weights", checks["prompt length"].mend)))
    assert again["prompt length"].verdict == "green"


def test_a_wrong_key_is_a_red_check():
    (check,) = examine_words([*CLUSTER, "opd.guard.truncatd.action=stop"])
    assert check.verdict == "red" and "did you mean" in check.seen and "opd.guard.truncated" in check.seen


def test_a_red_check_ends_the_smoke_before_verl_is_started(world: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["verl", "smoke", *words(world, "vocabulary")]) == 2
    shown = capsys.readouterr()
    assert "red vocabulary: " in shown.out and "verl was not started" in shown.err and "--no-doctor" in shown.err
    assert "running verl" not in shown.out


def test_json_has_the_checks_and_the_run_in_one_document(world: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["verl", "smoke", "--json", *words(world, "vocabulary")]) == 2
    document = json.loads(capsys.readouterr().out)
    verdicts = {one["name"]: one["verdict"] for one in document["checks"]}
    assert document["verdict"] == verdicts["vocabulary"] == verdicts["steps"] == "red"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_opd_doctor_verl_takes_a_command_line(world: Path):
    command = [sys.executable, "-m", "opd.cli.main", "doctor", "verl", "--json", *words(world, "no weights")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "VERL_PLATFORM": "cpu"}
    )
    document = json.loads(done.stdout)
    verdicts = {one["name"]: one["verdict"] for one in document["checks"]}
    assert verdicts["plugin"] == verdicts["vocabulary"] == "green" and done.returncode == 0, document

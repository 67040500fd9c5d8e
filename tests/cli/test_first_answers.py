"""How soon a command answers that its recipe is wrong: before torch is imported, and in a fraction of a second of CPU time."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

MAX_CPU_S = 1.2  # 0.3 on an idle machine; with torch and transformers it is 3.5 and more
TIMEOUT_S = 60
WATCHED = """
import sys
from opd.cli.main import main
code = main(sys.argv[1:])
print("code", code, "heavy", *sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
"""
GOOD = {
    "student": {"model": "student"},
    "teacher": {"model": "teacher"},
    "prompts": {"path": "prompts.jsonl"},
    "objective": {"divergence": "reverse_kl"},
    "train": {"steps": 2},
}


def with_key(section: str, key: str, value: object) -> Mapping[str, object]:
    return {**GOOD, section: {**GOOD.get(section, {}), key: value}}


WRONG: dict[str, tuple[Mapping[str, object] | None, str]] = {
    "no such recipe": (None, "No recipe at 'recipe.yaml'."),
    "a key that does not exist": (
        with_key("train", "step", 3),
        "Unknown key 'train.step'. Did you mean 'train.steps'?",
    ),
    "a section that does not exist": ({**GOOD, "trian": {}}, "Unknown key 'trian'. Did you mean"),
    "a key of the objective": (with_key("objective", "diverg", "x"), "Unknown key 'objective.diverg'."),
    "a word of the wrong type": (with_key("train", "steps", "many"), "'train.steps' cannot be 'many'"),
    "a rule of one section": (with_key("rollout", "temperature", 0.0), "rollout.temperature must be a positive number"),
    "a rule of the objective": (with_key("objective", "beta", 0.3), "objective: beta=0.3 is not read by reverse_kl"),
    "a rule between objective and rollout": (
        {**with_key("rollout", "top_k", 5), "objective": {"support": "sampled", "estimator": "k2"}},
        "needs tokens drawn from the very distribution it trains",
    ),
    "a rule between objective and reward": (
        {**with_key("rl", "weight", 1.0), "rl": {"weight": 1.0, "combine": "advantages"}},
        "combine='advantages' adds the distillation advantage",
    ),
    "a teacher that the recipe lacks": ({k: v for k, v in GOOD.items() if k != "teacher"}, "'teacher' is not set"),
    "prompts that are not there": (with_key("prompts", "path", "prompt.jsonl"), "prompt.jsonl"),
    "prompts of another kind": (with_key("prompts", "path", "notes.txt"), "which is not a prompt format"),
    "held-out prompts that are not there": (with_key("prompts", "eval_path", "held_out.jsonl"), "held_out.jsonl"),
    "a student that is not there": (with_key("student", "model", "./studnet"), "There is no folder './studnet'."),
    "a teacher that is not there": (with_key("teacher", "model", "./taecher"), "Give teacher.model a model's folder"),
    "a folder without a model": (with_key("teacher", "model", "empty"), "The teacher 'empty' has no config.json"),
}


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with what `GOOD` names, as far as it is looked at before a model is loaded."""
    for name in ("student", "teacher", "empty"):
        (tmp_path / name).mkdir()
    for name in ("student", "teacher"):
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "1 + 1 ="}) + "\n")
    (tmp_path / "notes.txt").write_text("1 + 1 =")
    return tmp_path


def answer(desk: Path, *words: str) -> tuple[str, str, float]:
    """The last line of standard output, standard error, and the seconds of CPU time of the command in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *words], cwd=desk, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout.splitlines()[-1], done.stderr, used


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_recipe_is_refused_before_torch_is_imported(desk: Path, case: str):
    recipe, said = WRONG[case]
    if recipe is not None:
        (desk / "recipe.yaml").write_text(yaml.safe_dump(dict(recipe)))
    last, errors, used = answer(desk, "train", "recipe.yaml")
    assert said in errors
    assert last == "code 1 heavy"
    assert used < MAX_CPU_S


@pytest.mark.parametrize(
    "words",
    [
        ("train", "recipe.yaml", "--train.step", "3"),
        ("rollouts", "recipe.yaml", "--out", "kept", "--train.step", "3"),
        ("demo", "--train.step", "3"),
        ("serve-teacher", "teacher", "--prot", "3"),
    ],
    ids=lambda words: words[0],
)
def test_every_command_refuses_a_misspelt_key_before_torch_is_imported(desk: Path, words: tuple[str, ...]):
    (desk / "recipe.yaml").write_text(yaml.safe_dump(GOOD))
    last, errors, used = answer(desk, *words)
    assert "error: Unknown key '" in errors
    assert last == "code 1 heavy"
    assert used < MAX_CPU_S


@pytest.mark.parametrize("command", ["train", "rollouts", "demo"])
def test_the_help_of_a_recipes_keys_needs_no_torch(desk: Path, command: str):
    last, errors, _ = answer(desk, command, "--help")
    assert (last, errors) == ("code 0 heavy", "")


def test_a_recipe_that_is_right_reaches_the_models(desk: Path):
    """The cases above would pass if everything were refused."""
    (desk / "recipe.yaml").write_text(yaml.safe_dump(GOOD))
    last, errors, _ = answer(desk, "train", "recipe.yaml", "--log.progress", "off")
    assert "tokenizer" in errors and last.endswith("heavy numpy torch transformers")

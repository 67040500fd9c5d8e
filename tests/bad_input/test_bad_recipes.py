"""Recipes and command lines with something wrong in them."""

from __future__ import annotations

import pytest
from opd_user import WRONG_COMMAND_LINE, User


def test_an_unknown_command_is_answered_with_the_nearest_one(user: User):
    user.opd("trian").refuses("no command 'trian'", "Did you mean 'train'?", "demo, check", code=WRONG_COMMAND_LINE)


def test_no_command_shows_the_commands(user: User):
    outcome = user.opd()
    assert outcome.code == WRONG_COMMAND_LINE
    assert "usage: opd COMMAND" in outcome.out


def test_train_without_a_recipe_says_how_to_give_one(user: User):
    user.opd("train").refuses("Give a recipe", "opd train RECIPE.yaml", "opd demo")


def test_a_recipe_after_the_overrides_is_pointed_out(user: User):
    user.opd("train", "--train.steps", "3", user.desk.recipe).refuses("The recipe comes first", "recipe.yaml")


def test_a_missing_recipe_names_its_path(user: User):
    user.opd("train", "nowhere/recipe.yaml").refuses("No recipe at 'nowhere/recipe.yaml'", "Give the path of a YAML")


def test_a_folder_as_recipe_is_refused(user: User):
    user.opd("train", user.folder).refuses("is a folder", "give the YAML file in it")


def test_a_binary_recipe_is_refused(user: User):
    user.opd("train", user.desk.student / "model.safetensors").refuses("is not text", "YAML file in UTF-8")


def test_broken_yaml_names_the_line(user: User):
    recipe = user.writes("broken.yaml", "train:\n  steps: [1\n  layout: packed\n")
    user.opd("train", recipe).refuses("not valid YAML", "mend", "line 3")


def test_a_recipe_that_is_a_list_is_refused(user: User):
    recipe = user.writes("list.yaml", "- train\n- steps\n")
    user.opd("train", recipe).refuses("must be a mapping of sections, not a list", "write e.g.")


def test_an_empty_recipe_says_what_has_to_be_there(user: User):
    user.opd("train", user.writes("empty.yaml", "")).refuses("'student' is not set", "no default", "--student.model")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.stepz", "train.steps"),  # misspelt
        ("trian.steps", "train"),  # misspelt section
        ("train.temperature", "rollout.temperature"),  # right key, wrong section
        ("lr", "optimizer.lr"),  # right key, no section
        ("student.lora.rnak", "student.lora.rank"),  # section within a section
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_name(user: User, key: str, nearest: str):
    user.train(f"--{key}", "1").refuses("Unknown key", f"Did you mean '{nearest}'?", "Keys of")
    assert not user.run_dir.exists()


def test_an_unknown_key_in_the_file_is_refused_as_on_the_command_line(user: User):
    recipe = user.writes("typo.yaml", "optimiser:\n  lr: 1.0e-3\n")
    user.opd("train", recipe).refuses("Unknown key 'optimiser'", "Did you mean 'optimizer'?")


def test_a_key_like_no_other_lists_what_there_is(user: User):
    outcome = user.train("--train.zzzzzz", "1")
    outcome.refuses("Unknown key 'train.zzzzzz'", "Keys of section 'train'", "prompts_per_step")
    assert "Did you mean" not in outcome.err


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("train.steps", "many", "valid integer"),
        ("train.steps", "2.5", "fractional part"),
        ("train.steps", "true", "it is a number"),
        ("train.steps", "null", "valid integer"),
        ("optimizer.lr", "fast", "valid number"),
        ("optimizer.lr", "true", "it is a number"),
        ("prompts.limit", "false", "it is a number"),
        ("prompts.shuffle", "perhaps", "valid boolean"),
        ("train.layout", "rigth_padded", "Did you mean 'right_padded'?"),
        ("objective.divergence", "revers_kl", "Did you mean 'reverse_kl'?"),
        ("objective.divergence", "jsd", "Did you mean 'generalized_jsd'?"),
        ("objective.divergence", "KL", "Did you mean 'reverse_kl' or 'forward_kl'?"),
        ("objective.divergence", "tvd", "Did you mean 'total_variation'?"),
        ("objective.reduction", "mean", "Did you mean 'token_mean' or 'sequence_mean'?"),
        ("student.dtype", "fp16", "Did you mean 'float16'?"),
        ("student.revision", "123", "Put it in quotes"),
        ("optimizer.betas", "0.9", "too few values"),
    ],
)
def test_a_value_of_the_wrong_type_names_key_value_and_what_is_wanted(user: User, key: str, value: str, why: str):
    user.train(f"--{key}", value).refuses(f"'{key}'", why)


def test_a_value_for_a_whole_section_is_refused(user: User):
    user.train("--train", "5").refuses("'train' is a section and cannot be 5", "--train.steps VALUE")


def test_an_empty_section_is_refused(user: User):
    recipe = user.writes("empty_section.yaml", "train:\n")
    user.opd("train", recipe).refuses("'train' is a section and is empty", "--train.steps VALUE")


def test_a_key_without_a_value_is_refused(user: User):
    user.train("--train.steps").refuses("--train.steps needs a value", "--train.steps VALUE")


@pytest.mark.parametrize(("typed", "meant"), [("--resum", "--resume"), ("--overwirte", "--overwrite")])
def test_a_misspelt_switch_is_answered_with_the_nearest_one(user: User, typed: str, meant: str):
    user.train(typed).refuses(f"{typed} needs a value", f"Did you mean {meant}?")


@pytest.mark.parametrize("forgotten", [("train.steps", "3"), ("-train.steps", "3"), ("train.steps=3",)])
def test_a_key_without_its_dashes_is_pointed_out(user: User, forgotten: tuple[str, ...]):
    user.opd("train", user.desk.recipe, "--seed", "1", *forgotten).refuses("looks like a key", "write --train.steps")


def test_a_stray_word_is_refused(user: User):
    user.opd("train", user.desk.recipe, "fast").refuses("Unexpected argument 'fast'", "--section.key value")


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("rollout.temperature", "0", "samples of the student's own distribution"),
        ("rollout.temperature", "-1", "must be a positive number"),
        ("rollout.temperature", ".nan", "must be a positive number"),
        ("rollout.top_p", "1.5", "in (0, 1]"),
        ("rollout.lmbda", "2", "from 0 to 1"),
        ("eval.temperature", "-0.5", "must be 0 (greedy) or positive"),
        ("eval.extra_temperatures", ".inf", "must be 0 (greedy) or positive"),
        ("optimizer.lr", ".nan", "must be a positive number"),
        ("optimizer.lr", "0", "must be a positive number"),
        ("optimizer.adamw_lr", ".inf", "must be a positive number"),
        ("optimizer.weight_decay", ".inf", "must be 0 or a positive number"),
        ("optimizer.max_grad_norm", "-1", "must be 0 (off) or positive"),
        ("train.steps", "0", "must be at least 1"),
        ("student.lora.rank", "0", "must be at least 1"),
        ("run_dir", "''", "name a folder"),
    ],
)
def test_a_number_out_of_range_names_key_and_range(user: User, key: str, value: str, why: str):
    user.opd("train", user.desk.recipe, "--run_dir", user.run_dir, f"--{key}", value).refuses(key, why)


def test_resume_and_overwrite_together_are_refused(user: User):
    before = user.has_finished_run()
    user.train("--resume", "--overwrite").refuses("--resume continues", "--overwrite deletes", "give one of the two")
    assert user.files() == before


def test_report_of_what_is_no_run_is_refused(user: User):
    user.opd("report").refuses("Give one run folder", "opd report RUN_DIR")
    user.opd("report", user.folder / "nowhere").refuses("no folder", "Give the folder")
    user.opd("report", user.desk.student).refuses("is not a run folder", "metrics.jsonl", "Give the folder")


def test_a_metric_log_that_is_not_installed_is_named_before_an_old_run_is_touched(user: User, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a))
    before = user.has_finished_run()
    user.train("--overwrite", log__wandb_project="mine").refuses("wandb", "not installed", "pip install 'opd[wandb]'")
    assert user.files() == before

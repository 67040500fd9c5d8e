"""The same through a shell: exit code, one line on stderr, and a traceback only when asked for."""

from __future__ import annotations

import pytest
from opd_user import EXPLAINED, WRONG_COMMAND_LINE, User


@pytest.mark.slow
def test_an_error_in_the_recipe_is_one_line_and_exit_code_1(user: User):
    outcome = user.train_in_shell(train__stepz=3)
    outcome.refuses("Unknown key 'train.stepz'", "Did you mean 'train.steps'?")
    assert len(outcome.err.strip().splitlines()) == 1
    assert outcome.out == ""


@pytest.mark.slow
def test_an_error_found_by_the_trainer_is_explained_without_a_traceback(user: User):
    before = user.has_finished_run()
    outcome = user.train_in_shell("--overwrite", rollout__max_new_tokens=100)
    outcome.refuses("prompt 0 has 3 tokens", "context of student", "is 64", "lower max_new_tokens")
    assert user.files() == before


@pytest.mark.slow
def test_debug_shows_the_traceback(user: User):
    outcome = user.train_in_shell("--debug", train__stepz=3)
    assert outcome.code == EXPLAINED
    assert "Traceback" in outcome.err
    assert "ConfigError: Unknown key 'train.stepz'. Did you mean 'train.steps'?" in outcome.err


def test_an_unknown_command_has_its_own_exit_code(user: User):
    user.shell("trian").refuses("Did you mean 'train'?", code=WRONG_COMMAND_LINE)

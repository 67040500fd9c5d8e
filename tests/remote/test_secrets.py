"""Secrets of a command line stay out of what a run writes down."""

import shlex

import pytest

from opd.config.recipe import whole_keys
from opd.remote.secrets import settings_without_secrets, without_secrets


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("train r.yaml --rollout.vllm.args --api-key abc --x 1", "train r.yaml --rollout.vllm.args --api-key '***' --x 1"),
        ("train r.yaml --api_key=abc", "train r.yaml '--api_key=***'"),
        ("serve --token abc", "serve --token '***'"),
        ("train --teacher.url https://me:abc@host/v1", "train --teacher.url 'https://***@host/v1'"),
        ("train --teacher.url 'https://host/v1?api_key=abc&x=1'", "train --teacher.url 'https://host/v1?api_key=***&x=1'"),
        ("train --student.model hf_abcdefgh12345", "train --student.model '***'"),
        ("train --note sk-abcdefgh12345", "train --note '***'"),
    ],
)  # fmt: skip
def test_keys_and_passwords_become_stars(command, shown):
    assert shlex.join(without_secrets(shlex.split(command))) == shown


def test_no_value_of_a_recipes_own_keys_is_taken_for_a_secret():
    for key in whole_keys():
        assert without_secrets([f"--{key}", "5"]) == [f"--{key}", "5"], key


def test_settings_are_masked_wherever_a_text_is():
    settings = {"rollout": {"vllm": {"args": ["--api-key", "abc", "--x"], "url": "http://a:b@h"}}, "seed": 1, "n": None}
    assert settings_without_secrets(settings) == {
        "rollout": {"vllm": {"args": ["--api-key", "***", "--x"], "url": "http://***@h"}},
        "seed": 1,
        "n": None,
    }

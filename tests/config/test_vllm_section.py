"""rollout.engine and rollout.vllm: what a recipe may say, and refusals that tell what to write instead."""

from __future__ import annotations

import re
from typing import Any

import pytest

from opd.config import Config, RolloutConfig, VllmConfig
from opd.config.recipe import build, load, to_dict, to_yaml
from opd.doctor.checks import notices
from opd.errors import ConfigError

SECRET = "sk-live-0123456789"


def recipe(rollout: dict[str, Any], **more: Any) -> Config:
    return build(
        {"student": {"model": "s"}, "teacher": {"model": "t"}, "prompts": {"path": "p"}, "rollout": rollout} | more
    )


def test_the_engine_is_transformers_unless_a_recipe_says_otherwise():
    assert RolloutConfig().engine == "hf" and RolloutConfig().vllm == VllmConfig()


def test_the_mode_follows_the_address():
    assert VllmConfig().mode == "managed"
    assert VllmConfig(url="http://127.0.0.1:8000").mode == "server"
    written = recipe({"engine": "vllm", "vllm": {"url": "http://localhost:1"}})
    assert to_dict(written)["rollout"]["vllm"]["mode"] == "server" and build(to_dict(written)) == written


def test_one_argument_of_the_server_is_a_list_of_one():
    words = ["--rollout.engine", "vllm", "--rollout.vllm.args=--enforce-eager", "--student.model", "s"]
    config = load(None, [*words, "--teacher.model", "t", "--prompts.path", "p"])
    assert config.rollout.vllm.args == ("--enforce-eager",)


@pytest.mark.parametrize(
    ("section", "what"),
    [
        (
            {"mode": "managed", "url": "http://h:1"},
            "rollout.vllm.url is read with rollout.vllm.mode=server, and the mode is managed",
        ),
        ({"mode": "server"}, "needs the server's address; set rollout.vllm.url"),
        ({"url": "http://h:1", "python": "p"}, "rollout.vllm.python is read with rollout.vllm.mode=managed"),
        ({"url": "http://h:1", "memory_share": 0.5}, "memory_share is read with rollout.vllm.mode=managed or colocate"),
        ({"mode": "colocate", "sync_dir": "/x"}, "sync_dir is read with rollout.vllm.mode=managed or server"),
        ({"mode": "colocate", "args": ["--seed", "1"]}, "args is read with rollout.vllm.mode=managed"),
        ({"args": ["--port=1"]}, "--port=1, which opd sets itself"),
        ({"url": "127.0.0.1:8000"}, "is no address of a server; write e.g. http://127.0.0.1:8000"),
        ({"url": "http://h:1", "timeout": 0}, "rollout.vllm.timeout must be a positive number"),
        ({"max_gap": -1}, "rollout.vllm.max_gap must be a positive number"),
        ({"memory_share": 1.5}, "must be in (0, 1]"),
        ({"max_model_len": 1}, "must hold a prompt and a response"),
        ({"mode": "manged"}, "Did you mean 'managed'?"),
        ({"urls": "http://h:1"}, "Did you mean 'rollout.vllm.url'?"),
    ],
)
def test_a_setting_that_nobody_would_read_is_refused(section: dict[str, Any], what: str):
    with pytest.raises(ConfigError, match=re.escape(what)):
        recipe({"engine": "vllm", "vllm": section})


@pytest.mark.parametrize(
    "section",
    [
        {"url": "http://h:1", "api_key_env": SECRET},
        {"url": f"http://user:{SECRET}@h:1"},
        {"url": f"http://h:1/?key={SECRET}"},
        {"args": ["--api-key", SECRET]},
        {"args": [f"--api-key={SECRET}"]},
    ],
)
def test_a_key_in_a_recipe_is_refused_and_not_repeated(section: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"environment variable|needs none") as refused:
        recipe({"engine": "vllm", "vllm": section})
    assert SECRET not in str(refused.value)


def test_settings_of_vllm_without_vllm_are_refused():
    with pytest.raises(ConfigError, match=r"read with rollout.engine=vllm.*set rollout.engine=vllm, or drop"):
        recipe({"vllm": {"url": "http://127.0.0.1:1"}})
    with pytest.raises(ConfigError, match=r"importance_cap=3\.0 is read with rollout.engine=vllm"):
        recipe({"importance_cap": 3.0})
    with pytest.raises(ConfigError, match="must be a number of at least 1"):
        recipe({"engine": "vllm", "importance_cap": 0.5})


def test_the_tokens_of_highest_entropy_need_entropies():
    with pytest.raises(ConfigError, match=r"no entropies; set train.token_fraction=1, or rollout.engine=hf"):
        recipe({"engine": "vllm"}, train={"token_fraction": 0.5})


def test_a_temperature_that_vllm_does_not_take_is_refused():
    with pytest.raises(ConfigError, match=r"rollout.temperature=3, and vLLM takes temperatures up to 2"):
        recipe({"engine": "vllm", "temperature": 3.0})
    with pytest.raises(ConfigError, match=r"eval.extra_temperatures=2.5, and vLLM"):
        recipe({"engine": "vllm"}, eval={"extra_temperatures": [0.0, 2.5]})
    assert recipe({"temperature": 3.0}).rollout.temperature == 3.0


def test_plain_http_to_another_machine_is_a_warning_and_to_this_one_is_none():
    def said(url: str) -> bool:
        return any("plain text" in note for note in notices(recipe({"engine": "vllm", "vllm": {"url": url}})))

    assert said("http://gpu7:8000") and said("http://10.0.0.1:8000")
    assert not any(map(said, ("https://gpu7", "http://localhost:8000", "http://127.0.0.1:8", "http://[::1]:8")))


def test_the_name_of_a_variable_is_what_config_yaml_holds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_KEY", SECRET)
    config = recipe({"engine": "vllm", "vllm": {"url": "http://127.0.0.1:1", "api_key_env": "MY_KEY"}})
    assert SECRET not in to_yaml(config) and "MY_KEY" in to_yaml(config)

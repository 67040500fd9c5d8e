"""The keys of a teacher behind a server: what cannot be used is refused with what to do."""

from __future__ import annotations

from typing import Any

import pytest

from opd.config import Config
from opd.config.recipe import build, merge, parse_overrides, to_yaml
from opd.errors import ConfigError, ObjectiveError, OpdError

URL = "http://127.0.0.1:8000"
SERVED: dict[str, Any] = {
    "student.model": "student",
    "prompts.path": "prompts.jsonl",
    "teacher.url": URL,
    "objective.support": "teacher_top_k",
}


def recipe(**more: object) -> Config:
    return build(merge({}, SERVED | {key.replace("__", "."): value for key, value in more.items()}))


def test_an_address_is_all_that_a_served_teacher_needs():
    teacher = recipe().teacher
    assert teacher is not None and (teacher.url, teacher.api, teacher.model) == ((URL,), "vllm", "")


def test_several_addresses_are_a_pool_in_a_recipe_and_on_the_command_line():
    several = [URL, "http://127.0.0.1:8001"]
    for given in ({"teacher.url": several}, parse_overrides(["--teacher.url", *several])):
        teacher = build(merge({}, SERVED | given)).teacher
        assert teacher is not None and list(teacher.url) == several


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "a key of a server without one": (
        {"teacher__url": [], "teacher__model": "t", "teacher__api_key_env": "KEY"},
        r"teacher\.api_key_env is about a server, and there is none; set teacher\.url, or drop it",
    ),
    "api without a server": ({"teacher__url": [], "teacher__model": "t", "teacher__api": "sglang"}, r"teacher\.api is"),
    "self-distillation": ({"teacher__source": "ema"}, r"teacher\.source=ema takes the student's own weights"),
    "offload": ({"teacher__offload": True}, r"teacher\.offload is about a model in this process"),
    "device": ({"teacher__device": "cuda:1"}, r"teacher\.device is about a model in this process"),
    "dtype": ({"teacher__dtype": "bfloat16"}, r"teacher\.dtype is about a model in this process"),
    "hidden states": ({"teacher__supply": "hidden"}, r"supply=hidden is more than a server with api=vllm sends"),
    "logits": ({"teacher__supply": "dense"}, r"supply=dense is more than"),
    "a revision of nothing": ({"teacher__revision": "main"}, r"about teacher\.model, which names the tokenizer"),
    "a chat endpoint": ({"teacher__url": f"{URL}/v1/chat/completions"}, "A chat API cannot score given tokens"),
    "an address as a model": ({"teacher__url": [], "teacher__model": URL}, r"the address of a server is teacher\.url"),
    "no address": ({"teacher__url": "127.0.0.1:8000"}, "http://HOST:PORT"),
    "the same address twice": ({"teacher__url": [URL, f"{URL}/v1"]}, "more than once"),
    "no time": ({"teacher__timeout": 0}, r"teacher\.timeout must be a positive number"),
    "no connections": ({"teacher__concurrency": 0}, r"teacher\.concurrency must be at least 1"),
    "a negative canary": ({"teacher__canary_every": -1}, r"teacher\.canary_every must be at least 0"),
    "answers of the teacher": (
        {"rollout__lmbda": 0.5, "rollout__off_policy": "teacher"},
        r"one behind teacher\.url only scores; use rollout\.off_policy=dataset",
    ),
    "a mixture of losses": (
        {"teacher__url": None, "teachers": {"a": {"url": URL}, "b": {"model": "b"}}, "mixture__kind": "loss"},
        r"mixture\.kind=loss mixes whole distributions.*teachers\.a\.url.*mixture\.kind=routing",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_used_is_refused(what: str):
    changes, said = REFUSED[what]
    values = SERVED | {key.replace("__", "."): value for key, value in changes.items()}
    values = {key: value for key, value in values.items() if value is not None}
    with pytest.raises(ConfigError, match=said):
        build(merge({}, values))


@pytest.mark.parametrize(
    ("objective", "needs"),
    [
        ({"support": "full"}, "every vocabulary entry"),
        ({"support": "student_top_k"}, "tokens that the student chooses"),
        ({"support": "union"}, "tokens that the student chooses"),
        ({"support": "teacher_top_k", "always_include": [2]}, r"always_include=\(2,\)"),
        ({"support": "teacher_top_k", "teacher_temperature": 2.0}, "teacher_temperature=2"),
    ],
)
def test_an_objective_that_a_server_cannot_feed_is_refused_with_one_that_it_can(objective: dict[str, Any], needs: str):
    changes: dict[str, object] = {f"objective.{key}": value for key, value in objective.items()}
    with pytest.raises(ObjectiveError, match=rf"{needs}.*teacher\.url.*tail=sampled.*2609\.34447"):
        build(merge({}, SERVED | changes))


@pytest.mark.parametrize(
    "objective",
    [
        {"support": "teacher_top_k", "tail": "sampled"},
        {"support": "sampled", "estimator": "k1", "delivery": "advantage"},
    ],
)
def test_what_the_refusal_advises_is_accepted(objective: dict[str, Any]):
    build(merge({}, SERVED | {f"objective.{key}": value for key, value in objective.items()}))


SECRET = "sk-0123456789abcdef"


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher.url": f"http://user:{SECRET}@host"},
        {"teacher.url": f"http://host?key={SECRET}"},
        {"teacher.url": [URL, f"http://{SECRET}@host"]},
        {"teacher.api_key_env": SECRET},
        {"teacher.api_key_env": f"Bearer {SECRET}"},
    ],
)
def test_a_key_in_a_recipe_is_refused_and_not_shown(changes: dict[str, Any]):
    with pytest.raises(OpdError, match=r"environment variable") as raised:
        build(merge({}, SERVED | changes))
    assert SECRET not in str(raised.value)


def test_a_written_recipe_holds_the_name_of_the_key_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TEACHER_KEY", SECRET)
    written = to_yaml(recipe(teacher__api_key_env="TEACHER_KEY"))
    assert "api_key_env: TEACHER_KEY" in written and SECRET not in written

"""`opd train` under a real `opd serve-teacher` process is `opd train` under a teacher of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from opd.cli.main import main
from opd.config.recipe import build, merge
from opd.errors import ConfigError, ModelError, RunFolderError, ServerError
from opd.testing import digit_tokenizer, save_model, tiny_causal_lm
from opd.trainer import train
from served import server_process
from worlds import make_world, settings

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

TOKEN = "a-token-of-this-test"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def recipe(world: Path, run_dir: Path, url: str | None, **more: Any) -> Any:
    """With a served teacher, or a local one where there is no url."""
    served = {} if url is None else {"teacher.url": url, "teacher.api": "opd", "teacher.dtype": "float32"}
    values = settings(world, run_dir, **more) | {k: v for k, v in served.items() if k.replace(".", "__") not in more}
    if url is not None and "teacher__model" not in more:
        del values["teacher.model"]
    return build(merge({}, values))


def numbers(run_dir: Path) -> list[tuple[Any, ...]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], m["loss"], m["reverse_kl"]) for r in rows if "loss" in (m := r.get("metrics", r))]


def evaluated(run_dir: Path) -> Any:
    summary = json.loads((run_dir / "summary.json").read_text())
    return {who: summary[who] for who in ("student_before", "student_after")}


def test_a_run_is_the_local_teachers_run(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The recipe's line as the server prints it, on the command line; losses and evaluations, step by step."""
    train(recipe(world, tmp_path / "local", None))
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    words = (str(world / "teacher"), "--port", "0", "--token-env", "MY_TOKEN")
    with server_process(*words, MY_TOKEN=TOKEN) as (_, url, lines):
        values = settings(world, tmp_path / "served")
        del values["teacher.model"]
        flags = [word for key, value in values.items() for word in (f"--{key}", str(value))]
        file = tmp_path / "recipe.yaml"
        file.write_text(lines[-1] + "\n")
        assert main(["train", str(file), *flags, "--teacher.dtype", "float32"]) == 0
        headers = {"authorization": f"Bearer {TOKEN}"}
        metrics = httpx.get(f"{url}/metrics", headers=headers, trust_env=False).text
    assert 'path="/v1/head",status="200"} 1.0' in metrics
    local, served = numbers(tmp_path / "local"), numbers(tmp_path / "served")
    assert len(local) == 8
    for ours, theirs in zip(served, local, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-6)
    assert json.dumps(evaluated(tmp_path / "served"))[:60] == json.dumps(evaluated(tmp_path / "local"))[:60]
    for who, row in evaluated(tmp_path / "local").items():
        assert evaluated(tmp_path / "served")[who]["reverse_kl"] == pytest.approx(row["reverse_kl"], abs=2e-6)
    everything = [p.read_bytes() for p in (tmp_path / "served").rglob("*") if p.is_file()]
    assert not any(TOKEN.encode() in content for content in everything)


def test_a_run_goes_on_with_the_same_model_at_another_address_and_not_with_another(world: Path, tmp_path: Path):
    with server_process(str(world / "teacher"), "--port", "0") as (_, url, _lines):
        train(recipe(world, tmp_path / "run", url, train__steps=4))
    with server_process(str(world / "teacher"), "--port", "0") as (_, url, _lines):
        train(recipe(world, tmp_path / "run", url, train__steps=6), resume=True)
    with (
        server_process(str(world / "student"), "--port", "0") as (_, url, _lines),
        pytest.raises(RunFolderError, match="teacher's own weights differ"),
    ):
        train(recipe(world, tmp_path / "run", url, train__steps=8), resume=True)


def test_jsd_two_served_teachers_mixed_are_two_local_teachers_mixed(world: Path, tmp_path: Path):
    """Hidden states are whole distributions, so mixtures are exact too."""
    more: dict[str, Any] = {
        "mixture__kind": "probability",
        "objective__divergence": "generalized_jsd",
        "train__steps": 3,
    }
    for name in ("local", "served"):
        values = settings(world, tmp_path / name, **more)
        del values["teacher.model"]
        with (
            server_process(str(world / "teacher"), "--port", "0") as (_, one, _a),
            server_process(str(world / "student"), "--port", "0") as (_, two, _b),
        ):
            for teacher, url in (("teacher", one), ("student", two)):
                own = {"url": url, "api": "opd", "dtype": "float32"}
                own = own if name == "served" else {"model": str(world / teacher)}
                values |= {f"teachers.{teacher}s.{key}": value for key, value in own.items()}
            train(build(merge({}, values)))
    for ours, theirs in zip(numbers(tmp_path / "served"), numbers(tmp_path / "local"), strict=True):
        assert ours == pytest.approx(theirs, abs=2e-6)


def test_a_tokenizer_that_is_not_the_servers_is_refused(world: Path, tmp_path: Path):
    tokenizer = digit_tokenizer(extra="x")
    save_model(tiny_causal_lm(tokenizer, hidden=32, layers=1, max_positions=64), tokenizer, tmp_path / "other")
    with server_process(str(world / "teacher"), "--port", "0") as (_, url, _lines):
        with pytest.raises(ModelError, match=r"not the one that .* is served with.*Drop teacher\.model"):
            train(recipe(world, tmp_path / "run", url, teacher__model=str(tmp_path / "other")))
        train(recipe(world, tmp_path / "same", url, teacher__model=str(world / "teacher"), train__steps=1))


def test_a_server_that_asks_for_a_token_names_the_key(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = (str(world / "teacher"), "--port", "0", "--token-env", "MY_TOKEN")
    with server_process(*words, MY_TOKEN=TOKEN) as (_, url, _lines):
        with pytest.raises(ServerError, match=r"teacher\.api_key_env"):
            train(recipe(world, tmp_path / "run", url))
        monkeypatch.setenv("MY_TOKEN", "another-token-than-that")
        with pytest.raises(ServerError, match="The token is not this server's"):
            train(recipe(world, tmp_path / "run", url, teacher__api_key_env="MY_TOKEN"))


def test_a_server_that_is_not_there_is_named(world: Path, tmp_path: Path):
    more: dict[str, Any] = {"teacher__deadline": 1.0, "teacher__timeout": 0.5}
    with pytest.raises(ServerError, match=r"http://127\.0\.0\.1:9"):
        train(recipe(world, tmp_path / "run", "http://127.0.0.1:9", **more))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"teacher__served_model": "x"}, "teacher.served_model is not read with teacher.api=opd"),
        ({"teacher__dtype": "float16"}, "no dtype in which hidden states travel"),
        ({"teacher__load_options": {"quantization": "torchao-int8"}}, "give it to opd serve-teacher"),
        ({"rollout__lmbda": 0.5, "rollout__off_policy": "teacher"}, "only scores"),
    ],
)
def test_keys_that_a_served_teacher_does_not_read_are_refused(world: Path, tmp_path: Path, more: Any, said: str):
    with pytest.raises(ConfigError, match=said):
        recipe(world, tmp_path / "run", "http://127.0.0.1:9", **more)

"""A teacher behind a real vLLM says what transformers says of the same weights, and is found out when its weights change."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import opd
from opd.data.rendering import Renderer
from opd.errors import ServerError
from opd.remote.pool import ServerPool
from opd.teachers.local import LocalTeacher
from opd.teachers.server import RemoteTeacher
from opd.teachers.vocabulary import VocabularyMatch
from opd.testing import byte_tokenizer, save_model, tiny_causal_lm
from remote.scripted import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is in an environment of its own: make vllm"
    ),
]

TOKENIZER = byte_tokenizer()
VOCABULARY = VocabularyMatch(size=len(TOKENIZER))
TOP_K = 32
OBJECTIVE = opd.Objective(support="teacher_top_k", top_k=TOP_K, tail="sampled")
SAMPLED = opd.Objective(support="sampled", estimator="k1", delivery="advantage")
START_LIMIT = 400.0  # seconds, on a loaded machine


def teacher_model(seed: int = 2) -> Any:
    sizes: Any = {
        "hidden": 128,
        "heads": 4,
        "kv_heads": 2,
        "layers": 2,
        "max_positions": 256,
    }  # vLLM wants head_dim ≥ 32
    return tiny_causal_lm(TOKENIZER, architecture="llama", seed=seed, initializer_range=0.15, **sizes)


class Vllm:
    """A server process of the user's, as README.md starts it."""

    def __init__(self, folder: Path, model: str, log: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log = log
        words = ["--model", model, "--served-model-name", "tiny", "--port", self.url.rpartition(":")[2]]
        words += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16"]
        words += ["--enforce-eager", "--max-logprobs", str(TOP_K)]
        environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_SERVER_DEV_MODE": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        with log.open("wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words],
                stdout=said,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment,
                start_new_session=True,
            )

    def ready(self) -> None:
        limit = time.monotonic() + START_LIMIT
        while time.monotonic() < limit and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.5)
        pytest.fail(f"vLLM did not start:\n{self.log.read_text(errors='replace')[-4000:]}")

    def post(self, path: str, body: Any = None) -> None:
        content = json.dumps(body or {}).encode()
        request = urllib.request.Request(self.url + path, content, {"content-type": "application/json"})
        urllib.request.urlopen(request, timeout=60).read()

    def load(self, folder: str) -> None:
        self.post("/pause?mode=wait")
        self.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
        self.post("/reset_prefix_cache")
        self.post("/resume")

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("models")
    return {
        name: save_model(teacher_model(seed), TOKENIZER, place / name) for name, seed in (("teacher", 2), ("other", 7))
    }


@pytest.fixture(scope="module")
def vllm(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    place = tmp_path_factory.mktemp("vllm")
    server = Vllm(place, folders["teacher"], place / "log.txt")
    try:
        server.ready()
        yield server
    finally:
        server.stop()


def rollouts(count: int = 12) -> list[opd.Rollout]:
    made = []
    for i in range(count):
        ids = torch.randint(len(TOKENIZER), (1 + 11 * i % 40,), generator=torch.Generator().manual_seed(i)).tolist()
        prompt = opd.Prompt(index=i, text=f"{i * 37} plus {i}")
        one = opd.Rollout(
            prompt=prompt, prompt_ids=(1,), response_ids=tuple(ids), sampler_logp=None, finished=True, policy_version=0
        )
        made.append(dataclasses.replace(one, id=i))
    return made


def remote(url: str, api: str, objective: opd.Objective, **options: Any) -> RemoteTeacher:
    pool = ServerPool(url, section="teacher", **options)
    teacher = RemoteTeacher(pool, Renderer(TOKENIZER, name="teacher"), api=api, vocabulary=VOCABULARY, canary_every=1)
    teacher.bind_objective(objective)
    return teacher


@pytest.mark.timeout(600)
@pytest.mark.parametrize("api", ["vllm", "openai"])
@pytest.mark.parametrize("objective", [OBJECTIVE, SAMPLED], ids=["top_k", "sampled"])
def test_it_says_what_transformers_says(vllm: Vllm, api: str, objective: opd.Objective):
    supply = "sampled" if objective.support == "sampled" else "top_k"
    oracle = LocalTeacher(
        teacher_model(), Renderer(TOKENIZER, name="teacher"), vocabulary=VOCABULARY, pad_id=0, supply=supply
    )
    oracle.bind_objective(objective)
    teacher = remote(vllm.url, api, objective)
    assert teacher.connect() == []
    for concurrency in (1, 8):
        teacher.pool.concurrency = concurrency
        for mine, theirs in zip(teacher.score(rollouts()), oracle.score(rollouts()), strict=True):
            assert torch.allclose(mine.teacher_logp, theirs.teacher_logp, atol=1e-4)  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(mine, opd.TopKTarget) and isinstance(theirs, opd.TopKTarget):
                assert mine.sampled_logp is not None and theirs.sampled_logp is not None
                assert torch.allclose(mine.sampled_logp, theirs.sampled_logp, atol=1e-4)
                clear = (theirs.teacher_logp[:, :-1] - theirs.teacher_logp[:, 1:]).amin() > 1e-4
                assert not clear or torch.equal(mine.ids, theirs.ids)
                assert (mine.ids == theirs.ids).float().mean() > 0.99


@pytest.mark.timeout(600)
def test_it_gives_the_loss_and_gradient_of_a_local_teacher_with_the_same_top_k(vllm: Vllm, tmp_path: Path):
    def distiller(teacher: Any, name: str) -> opd.Distiller:
        student = tiny_causal_lm(TOKENIZER, layers=1, hidden=32, seed=1, initializer_range=0.4)
        return opd.Distiller(
            student=(student, TOKENIZER),
            teacher=teacher,
            prompts=[{"prompt": f"{n} plus {n}"} for n in range(10, 40)],
            objective=OBJECTIVE,
            rollout={"max_new_tokens": 12},
            train={"steps": 4, "prompts_per_step": 6, "samples_per_prompt": 2},
            optimizer={"lr": 0.01, "warmup_steps": 0},
            eval={"every": 0},
            run_dir=tmp_path / name,
        )

    served = distiller({"url": vllm.url, "canary_every": 1}, "served")
    here = distiller({"model": (teacher_model(), TOKENIZER), "supply": "top_k"}, "here")
    for _ in range(4):
        mine, theirs = served.step(), here.step()
        for name in ("loss", "grad_norm", "teacher_logp", "reverse_kl"):
            assert mine[name] == pytest.approx(theirs[name], abs=1e-4), name


@pytest.mark.timeout(600)
@pytest.mark.parametrize("api", ["vllm", "openai"])
def test_more_log_probs_than_it_allows_names_the_flag(vllm: Vllm, api: str):
    teacher = remote(vllm.url, api, dataclasses.replace(OBJECTIVE, top_k=TOP_K + 1))
    with pytest.raises(ServerError, match=rf"--max-logprobs {TOP_K + 1}"):
        teacher.connect()


@pytest.mark.timeout(600)
def test_other_weights_in_the_server_stop_the_run_and_the_old_ones_go_on(vllm: Vllm, folders: dict[str, str]):
    teacher = remote(vllm.url, "vllm", OBJECTIVE)
    teacher.score(rollouts())
    vllm.load(folders["other"])
    with pytest.raises(ServerError, match="other log-probs to a fixed text than at the start"):
        teacher.score(rollouts())
    vllm.load(folders["teacher"])
    teacher.score(rollouts())


@pytest.mark.timeout(600)
def test_a_server_that_is_killed_ends_in_an_error_in_time(vllm: Vllm):
    """The last test: it ends the server."""
    teacher = remote(vllm.url, "vllm", OBJECTIVE, deadline=3.0)
    teacher.score(rollouts())
    vllm.stop()
    began = time.monotonic()
    with pytest.raises(ServerError, match=r"curl http://127\.0\.0\.1:\d+/health"):
        teacher.score(rollouts())
    assert time.monotonic() - began < 15

"""A teacher behind HTTP inside a test: the application of `opd serve-teacher` on a free port, in a thread."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import httpx
import torch
import uvicorn

from opd.config.serving import ServeConfig
from opd.data.rendering import Renderer
from opd.serving.app import make_app
from opd.serving.frozen import FrozenModel, frozen
from opd.serving.run import listen
from opd.teachers.hidden_wire import digest_of, read_answer
from opd.teachers.local import LocalTeacher
from opd.teachers.vocabulary import VocabularyMatch
from opd.testing import digit_tokenizer, tiny_causal_lm
from opd.trainer.load_models import LoadedModel
from opd.types import HiddenTarget, Prompt, Rollout

TOKENIZER = digit_tokenizer()


def teacher_model(**more: Any) -> Any:
    options: dict[str, Any] = {"hidden": 32, "layers": 1, "max_positions": 64, "seed": 2, "initializer_range": 0.4}
    return tiny_causal_lm(TOKENIZER, **options | more)


def soft_capped() -> Any:
    """A model whose logits are a function of its product with the output layer, as Gemma 2's are."""
    model = teacher_model()
    forward = model.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = 5 * torch.tanh(out.logits / 5)
        return out

    model.forward = capped
    return model


def freeze_model(model: Any, tokenizer: Any = TOKENIZER, name: str = "tiny") -> FrozenModel:
    renderer = Renderer(tokenizer, name=name)
    return frozen(name, LoadedModel(model=model, tokenizer=tokenizer, renderer=renderer, eos=(tokenizer.eos_token_id,)))


def local_teacher(model: Any, **more: Any) -> LocalTeacher:
    options: dict[str, Any] = {"vocabulary": VocabularyMatch(size=len(TOKENIZER)), "pad_id": 11} | more
    return LocalTeacher(model, Renderer(TOKENIZER, name="tiny"), **options)


@dataclass(frozen=True, kw_only=True)
class Watched(FrozenModel):
    """Remembers the batches that it read; while `gate` is not set, a forward pass waits."""

    batches: list[list[tuple[int, ...]]] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def outputs(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        self.gate.wait(60)
        self.batches.append([tuple(prompt) for prompt in prompts])
        return super().outputs(prompts, responses)


def watched(model: FrozenModel, *, closed: bool = False) -> Watched:
    found = Watched(**{item.name: getattr(model, item.name) for item in fields(FrozenModel)})
    if not closed:
        found.gate.set()
    return found


@dataclass(frozen=True)
class Running:
    url: str
    service: Any
    server: uvicorn.Server

    def metric(self, name: str, **labels: str) -> float:
        return self.service.measures.registry.get_sample_value(name, labels) or 0.0

    def wait_for(self, condition: Any, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come about"
            time.sleep(0.01)


@contextmanager
def serving(model: FrozenModel, *, token: str | None = None, port: int = 0, **limits: Any) -> Iterator[Running]:
    """The server, up inside and gone afterwards."""
    config = ServeConfig(model=model.name, **limits)
    app = make_app(model, config, token=token)
    with listen("127.0.0.1", port) as listening:
        server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=lambda: asyncio.run(server._serve(sockets=[listening])), daemon=True)
        thread.start()
        end = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < end and thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        try:
            yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", app.service, server)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            if isinstance(model, Watched):
                model.gate.set()
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def row(index: int, prompt_length: int, response_length: int, **more: Any) -> dict[str, Any]:
    """A row of random tokens, a function of its index."""
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(11, (prompt_length + response_length,), generator=generator).tolist()
    return {"id": f"row {index}", "prompt": ids[:prompt_length], "response": ids[prompt_length:], **more}


def expected_hidden(model: Any, one: dict[str, Any]) -> torch.Tensor:
    """A local teacher's hidden states of this row alone."""
    teacher = local_teacher(model)
    teacher.renderer.prompt_ids = lambda prompt: tuple(one["prompt"])  # pyright: ignore[reportAttributeAccessIssue]
    rollout = Rollout(
        prompt=Prompt(index=0, text=""),
        prompt_ids=tuple(one["prompt"]),
        response_ids=tuple(one["response"]),
        sampler_logp=None,
        finished=True,
        policy_version=0,
    )
    (target,) = teacher.score([rollout], "hidden")
    assert isinstance(target, HiddenTarget)
    return target.hidden


def read_rows(content: bytes, rows: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
    """The rows of an answer, each checked to be about the row that was asked about."""
    tensors, receipts, _ = read_answer(content)
    assert [r.id for r in receipts] == [one["id"] for one in rows]
    digests = [digest_of(one["prompt"], one["response"], one.get("positions")) for one in rows]
    assert [r.digest for r in receipts] == digests
    return list(tensors["hidden"].split([r.tokens for r in receipts]))


def ask_hidden(url: str, rows: Sequence[dict[str, Any]], dtype: str = "float32", **more: Any) -> httpx.Response:
    with httpx.Client(base_url=url, timeout=60, trust_env=False, **more) as client:
        return client.post("/v1/hidden", json={"rows": list(rows), "dtype": dtype})


@contextmanager
def server_process(*words: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The process, its address, and the lines it printed until it was ready."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "opd.cli.main", "serve-teacher", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process:
        try:
            lines = []
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                if line.startswith("teacher: "):
                    break
            found = re.search(r"^ready at (\S+)$", "\n".join(lines), flags=re.M)
            assert found is not None, lines
            yield process, found[1], lines
        finally:
            process.kill()

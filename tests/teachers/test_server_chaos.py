"""Servers that delay, hang up, fail, repeat and mix up answers: what is scored in the end is what a well server says."""

from __future__ import annotations

import copy
import random
import threading
from typing import Any

import pytest
import torch
from model_server import ModelServer

import opd
from opd.data.rendering import Renderer
from opd.remote.breaker import Patience
from opd.remote.pool import ServerPool
from opd.teachers.local import LocalTeacher
from opd.teachers.server import RemoteTeacher
from opd.teachers.vocabulary import VocabularyMatch
from opd.testing import digit_tokenizer, tiny_causal_lm
from remote.scripted import Asked, Reply, serving

APIS = ("vllm", "openai", "sglang")
TOKENIZER = digit_tokenizer()
VOCABULARY = VocabularyMatch(size=len(TOKENIZER))
OBJECTIVE = opd.Objective(support="teacher_top_k", top_k=4, tail="sampled")
MODEL: Any = tiny_causal_lm(TOKENIZER, layers=1, hidden=32, seed=2, initializer_range=0.4)
STUBBORN = Patience(first_wait=0.001, longest_wait=0.01, first_rest=0.005, longest_rest=0.02, refusals=40)
TIMEOUT = 0.5


class Chaos:
    """A well server behind something that is not."""

    def __init__(self, served: ModelServer) -> None:
        self.served = served
        self.random = random.Random()
        self.rate = 0.0
        self.lock = threading.Lock()
        self.earlier: dict[str, Reply] = {}
        self.done: dict[str, int] = {}

    def __call__(self, asked: Asked) -> Reply | None:
        with self.lock:
            reply = self.served(asked)
            fault = self.random.choice(FAULTS) if self.random.random() < self.rate else None
            stale = self.earlier.get(asked.path, reply)
            self.earlier[asked.path] = reply or Reply()
            drawn = self.random.random()
            if fault is not None:
                self.done[fault] = self.done.get(fault, 0) + 1
        assert reply is not None and stale is not None
        return reply if fault is None else self.spoilt(fault, reply, stale, drawn)

    def spoilt(self, fault: str, reply: Reply, stale: Reply, drawn: float) -> Reply | None:
        body = copy.deepcopy(reply.body)
        answers = body.get("choices") if isinstance(body, dict) else body
        if fault == "hang up":
            return None
        if fault == "mixed up" and isinstance(answers, list):
            return stale
        if fault == "repeated" and isinstance(answers, list):
            answers.append(answers[0])
        elif fault == "left out" and isinstance(answers, list):
            answers.pop()
        elif fault == "reordered" and isinstance(answers, list) and isinstance(body, dict):
            answers.reverse()
        made: dict[str, Any] = {
            "late": {"delay": 0.02 * drawn},
            "too late": {"delay": TIMEOUT * (1 + drawn) if drawn < 0.1 else 0.0},
            "500": {"status": 500},
            "503": {"status": 503},
            "429": {"status": 429, "headers": {"retry-after": "0.01"}},
            "cut off": {"cut": int(200 * drawn)},
        }.get(fault, {})
        return Reply(body=b"" if fault in ("500", "503", "429") else body, **made)


FAULTS = (
    "late",
    "too late",
    "hang up",
    "500",
    "503",
    "429",
    "cut off",
    "mixed up",
    "repeated",
    "left out",
    "reordered",
)


def rollouts(seed: int) -> list[opd.Rollout]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(8):
        length = int(torch.randint(1, 9, (1,), generator=generator))
        ids = tuple(torch.randint(len(TOKENIZER), (length,), generator=generator).tolist())
        prompt = opd.Prompt(index=i, text=f"{seed}{i}>")
        made.append(
            opd.Rollout(
                prompt=prompt,
                prompt_ids=(1,),
                response_ids=ids,
                sampler_logp=None,
                finished=True,
                policy_version=0,
                id=i,
            )
        )
    return made


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [100, pytest.param(200, marks=pytest.mark.endurance)])
@pytest.mark.parametrize("api", APIS)
def test_what_is_scored_through_chaos_is_what_a_well_server_says(api: str, seeds: int):
    renderer = Renderer(TOKENIZER, name="teacher")
    oracle = LocalTeacher(MODEL, renderer, vocabulary=VOCABULARY, pad_id=0, supply="top_k")
    oracle.bind_objective(OBJECTIVE)
    chaos = [Chaos(ModelServer(MODEL, TOKENIZER)) for _ in range(2)]
    with serving(*chaos) as servers:
        pool = ServerPool(
            [server.url for server in servers],
            section="teacher",
            concurrency=4,
            timeout=TIMEOUT,
            deadline=60.0,
            patience=STUBBORN,
        )
        teacher = RemoteTeacher(pool, renderer, api=api, vocabulary=VOCABULARY, canary_every=10)
        teacher.bind_objective(OBJECTIVE)
        teacher.connect()
        for seed in range(APIS.index(api), seeds, len(APIS)):
            for number, one in enumerate(chaos):
                one.random, one.rate = random.Random(2 * seed + number), 0.4
            for mine, theirs in zip(teacher.score(rollouts(seed)), oracle.score(rollouts(seed)), strict=True):
                assert isinstance(mine, opd.TopKTarget) and isinstance(theirs, opd.TopKTarget)
                assert torch.equal(mine.ids, theirs.ids), seed
                assert torch.allclose(mine.teacher_logp, theirs.teacher_logp, atol=1e-5), seed
                assert mine.sampled_logp is not None and theirs.sampled_logp is not None
                assert torch.allclose(mine.sampled_logp, theirs.sampled_logp, atol=1e-5), seed
        pool.close()
    for fault in FAULTS:
        assert sum(one.done.get(fault, 0) for one in chaos) >= seeds // 50, f"{fault} was hardly tried"

"""A student with adapters beside vLLM: the base goes there once, and every update sends the adapters alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import FakeVllm, serving
from peft import LoraConfig, get_peft_model
from test_vllm_sampler import ROWS, TOKENIZER, Learner, assert_on_policy, sampler_of

from opd.errors import ServerError
from opd.samplers.vllm import VllmSampler
from opd.samplers.vllm_http import VllmHttp
from opd.samplers.vllm_server import VllmServer
from opd.samplers.vllm_weights import SyncFolder, adapter_rank, merged_state
from opd.testing import save_model, tiny_causal_lm


def adapted(**settings: Any) -> Any:
    model = tiny_causal_lm(TOKENIZER, layers=1, hidden=32, max_positions=64, initializer_range=0.4, vocab_size=ROWS)
    return get_peft_model(model, LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings)))


@pytest.fixture
def student() -> Learner:
    learner = Learner(adapted())
    move(learner)
    return learner


def move(student: Learner) -> None:
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    student.version += 1


@pytest.fixture
def server(student: Learner, tmp_path: Path) -> Iterator[FakeVllm]:
    other = tiny_causal_lm(TOKENIZER, layers=1, hidden=32, max_positions=64, vocab_size=ROWS, seed=9)
    with serving(save_model(other, TOKENIZER, tmp_path / "served")) as running:
        yield running


@pytest.fixture
def sampler(server: FakeVllm, tmp_path: Path) -> Iterator[VllmSampler]:
    """With the base in the server, as a managed one has it from its start."""
    made = sampler_of(server, tmp_path)
    connect = partial(VllmHttp, key=None, timeout=20.0, connections=8)
    sync = SyncFolder(str(tmp_path / "sync"), {})
    made.engine = VllmServer(connect, sync, url=server.url, concurrency=8, patience=3.0, adapters=True)
    yield made
    made.engine.close()


def start_on_base(sampler: VllmSampler, server: FakeVllm, student: Learner) -> None:
    engine: Any = sampler.engine
    server.load(str(engine._sync.write_base(student.model)))


def folders(tmp_path: Path) -> list[str]:
    return sorted(path.name.rsplit("-", 1)[0] for path in (tmp_path / "sync").glob("*/[a-z]*"))


def test_every_update_sends_the_adapters_alone_and_samples_follow_it(
    sampler: VllmSampler, server: FakeVllm, student: Learner, tmp_path: Path
):
    start_on_base(sampler, server, student)
    for _ in range(5):
        sampler.load(student)
        assert_on_policy(sampler, student)
        assert folders(tmp_path) == [f"adapter-{student.version}", "base"]
        assert list(server.adapters) == [sampler.tag]
        move(student)
    assert not any(path == "/collective_rpc" for path, _ in server.asked)
    drawn = {body["model"] for path, body in server.asked if path == "/inference/v1/generate" and len(body) > 3}
    assert len(drawn) == 5 and "it" not in drawn


def test_a_connection_made_anew_draws_from_the_adapters_and_not_from_the_base(
    sampler: VllmSampler, server: FakeVllm, student: Learner
):
    start_on_base(sampler, server, student)
    sampler.load(student)
    engine: Any = sampler.engine
    engine._give_up()
    assert_on_policy(sampler, student)


def test_a_server_that_broke_off_while_it_took_adapters_has_them_afterwards(
    sampler: VllmSampler, server: FakeVllm, student: Learner
):
    start_on_base(sampler, server, student)
    sampler.load(student)
    move(student)
    lost = []

    def tamper(path: str, answer: dict[str, Any]) -> Any:
        if path == "/v1/load_lora_adapter" and not lost:
            lost.append(path)
            return None  # it was loaded, and the answer is lost
        return answer

    server.tamper = tamper
    sampler.load(student)
    assert lost and list(server.adapters) == [sampler.tag]
    assert_on_policy(sampler, student)


def test_a_server_that_takes_no_adapters_is_told_apart(sampler: VllmSampler, server: FakeVllm, student: Learner):
    start_on_base(sampler, server, student)
    server.tamper = lambda path, answer: (404, "Not Found") if path == "/v1/load_lora_adapter" else answer
    with pytest.raises(ServerError, match=r"answered 404 to /v1/load_lora_adapter.*--enable-lora"):
        sampler.load(student)


def test_the_base_is_written_without_what_the_adapters_add(student: Learner):
    fresh = adapted()
    plain, whole = (merged_state(student.model, adapted=added) for added in (False, True))
    same = merged_state(fresh, adapted=False)
    assert all(torch.equal(plain[name], same[name]) for name in same) and plain.keys() == whole.keys()
    assert any(not torch.equal(plain[name], whole[name]) for name in plain)


@pytest.mark.parametrize(
    ("settings", "rank"),
    [
        ({}, 8),
        ({"r": 8}, 8),
        ({"r": 33}, 64),
        ({"r": 600}, None),
        ({"use_rslora": True}, 8),
        ({"use_dora": True}, None),
        ({"bias": "lora_only"}, None),
        ({"modules_to_save": ["embed_tokens"]}, None),
        ({"rank_pattern": {"q_proj": 2}}, None),
        ({"target_modules": ["q_proj", "embed_tokens"]}, None),
        ({"target_modules": ["q_proj", "lm_head"]}, None),
    ],
    ids=str,
)
def test_adapters_go_alone_where_vllm_applies_them_itself(settings: dict[str, Any], rank: int | None):
    assert adapter_rank(adapted(**settings)) == rank


def test_a_student_without_adapters_has_no_rank():
    assert adapter_rank(tiny_causal_lm(TOKENIZER)) is None

"""What the server computes is what a local teacher computes, row by row."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load
from torch.nn import functional as F

from opd.teachers.hidden_wire import read_answer, read_metadata, tensors_digest
from opd.types import Prompt, Rollout
from served import (
    TOKENIZER,
    ask_hidden,
    expected_hidden,
    freeze_model,
    local_teacher,
    read_rows,
    row,
    serving,
    soft_capped,
    teacher_model,
    watched,
)

pytestmark = pytest.mark.timeout(120)

ROWS = [row(i, 1 + i % 5, 1 + i * 3 % 7) for i in range(12)]


def test_float32_hidden_states_are_a_local_teachers():
    model = teacher_model()
    with serving(freeze_model(model)) as server:
        found = read_rows(ask_hidden(server.url, ROWS).content, ROWS)
    for one, hidden in zip(ROWS, found, strict=True):
        torch.testing.assert_close(hidden, expected_hidden(model, one), rtol=0, atol=2e-6)


def test_a_row_alone_is_a_local_teachers_bit_for_bit():
    model = teacher_model()
    with serving(freeze_model(model)) as server:
        for one in ROWS:
            (hidden,) = read_rows(ask_hidden(server.url, [one]).content, [one])
            assert torch.equal(hidden, expected_hidden(model, one))


def test_bfloat16_is_the_default_and_rounds_once():
    model = teacher_model()
    with serving(freeze_model(model)) as server:
        content = httpx.post(f"{server.url}/v1/hidden", json={"rows": ROWS[:1]}, trust_env=False).content
    (hidden,) = read_rows(content, ROWS[:1])
    assert hidden.dtype == torch.bfloat16
    assert torch.equal(hidden, expected_hidden(model, ROWS[0]).to(torch.bfloat16))


def test_wanted_positions_come_in_the_order_they_were_named():
    model = teacher_model()
    asked = [row(1, 3, 6, positions=[5, 0, 2]), row(2, 2, 4, positions=[3])]
    with serving(freeze_model(model)) as server:
        found = read_rows(ask_hidden(server.url, asked).content, asked)
    for one, hidden in zip(asked, found, strict=True):
        torch.testing.assert_close(hidden, expected_hidden(model, one)[one["positions"]], rtol=0, atol=2e-6)


def test_long_and_short_rows_are_read_apart():
    """Rows of like length share a batch within the budget, padding included."""
    model = watched(freeze_model(teacher_model()))
    rows = [row(i, 30 if i % 2 else 2, 2) for i in range(8)]
    with serving(model, max_tokens=64) as server:
        read_rows(ask_hidden(server.url, rows).content, rows)
    assert all(len(batch) * (max(map(len, batch)) + 1) <= 64 for batch in model.batches)
    assert sorted(len(batch) for batch in model.batches) == [2, 2, 4]


def test_scores_are_a_local_teachers_top_k():
    model = teacher_model()
    local = local_teacher(model)
    local.top_k = 3
    rollouts = [
        Rollout(
            prompt=Prompt(index=i, text="".join(map(str, (t % 10 for t in one["prompt"])))),
            prompt_ids=(),
            response_ids=tuple(one["response"]),
            sampler_logp=None,
            finished=True,
            policy_version=0,
        )
        for i, one in enumerate(ROWS)
    ]
    rows = [
        {"id": str(i), "prompt": list(local.renderer.prompt_ids(r.prompt)), "response": list(r.response_ids)}
        for i, r in enumerate(rollouts)
    ]
    with serving(freeze_model(model)) as server:
        body = {"rows": rows, "top_k": 3, "vocabulary": len(TOKENIZER)}
        answer = httpx.post(f"{server.url}/v1/score", json=body, trust_env=False).content
    tensors, receipts, _ = read_answer(answer)
    assert [r.id for r in receipts] == [r["id"] for r in rows]
    expected: list[Any] = list(local.score(rollouts, "top_k"))
    assert torch.equal(tensors["ids"].long(), torch.cat([target.ids for target in expected]))
    for name, key in (("logp", "teacher_logp"), ("sampled_logp", "sampled_logp")):
        whole = torch.cat([getattr(target, key) for target in expected])
        torch.testing.assert_close(tensors[name], whole, rtol=0, atol=2e-6)


def test_the_head_comes_whole_and_with_its_hash():
    model = teacher_model(tie=False)
    with serving(freeze_model(model)) as server, httpx.Client(base_url=server.url, trust_env=False) as client:
        content, about = client.get("/v1/head").content, client.get("/v1/model").json()
    head = load(content)
    assert torch.equal(head["weight"], model.get_output_embeddings().weight)
    assert tensors_digest(head) == about["fingerprints"]["head"]
    assert read_metadata(content) == {"identity": about["identity"], "valid_rows": str(len(TOKENIZER))}


def test_another_weight_or_dtype_is_another_identity():
    model = teacher_model()
    first = freeze_model(model).identity
    assert freeze_model(teacher_model()).identity == first
    assert freeze_model(teacher_model().bfloat16()).identity != first
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.01)
    assert freeze_model(model).identity != first


def test_a_soft_capped_model_refuses_hidden_states_and_serves_scores():
    model = soft_capped()
    rows = ROWS[:3]
    with serving(freeze_model(model)) as server:
        about = httpx.get(f"{server.url}/v1/model", trust_env=False).json()
        refused = ask_hidden(server.url, rows)
        head = httpx.get(f"{server.url}/v1/head", trust_env=False)
        body = {"rows": rows, "top_k": 4, "vocabulary": len(TOKENIZER)}
        tensors, receipts, _ = read_answer(httpx.post(f"{server.url}/v1/score", json=body, trust_env=False).content)
    assert not about["hidden"]
    for answer in (refused, head):
        assert answer.status_code == 409
        assert "soft-cap" in answer.json()["error"]["message"]
    parts = tensors["logp"].split([r.tokens for r in receipts])
    for one, logp in zip(rows, parts, strict=True):
        ids = torch.tensor([one["prompt"] + one["response"]])
        with torch.no_grad():
            logits = model.forward(input_ids=ids).logits[0, len(one["prompt"]) - 1 : -1]
        torch.testing.assert_close(logp, F.log_softmax(logits, -1).topk(4).values, rtol=0, atol=1e-5)


def test_numbers_that_are_not_finite_are_an_error_of_their_row_alone():
    bad = {"id": "bad", "prompt": [9], "response": [1, 2]}
    good = {"id": "good", "prompt": [3], "response": [1, 2]}
    frozen_model = watched(freeze_model(teacher_model()), closed=True)
    with torch.no_grad():
        frozen_model.model.get_input_embeddings().weight[9] = float("nan")
    with serving(frozen_model) as server, ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(ask_hidden, server.url, [one]) for one in (bad, good)]
        server.wait_for(lambda: server.service.batcher.held_tokens == 4)
        frozen_model.gate.set()
        refused, answered = (one.result() for one in asked)
    assert refused.status_code == 500
    assert "row 'bad' are NaN or infinite" in refused.json()["error"]["message"]
    assert answered.status_code == 200

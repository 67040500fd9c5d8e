"""The teacher behind `opd serve-teacher` is the local teacher: targets, losses, gradients; and never another model's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opd.data.pack import pack
from opd.data.rendering import Renderer
from opd.errors import DataError, ObjectiveError, ServerError
from opd.losses import Objective
from opd.remote.breaker import Patience
from opd.remote.pool import ServerPool
from opd.teachers.cache import CachedTeacher
from opd.teachers.exact_server import ExactServerTeacher
from opd.teachers.local import LocalTeacher
from opd.teachers.served_model import ask_model
from opd.teachers.store import TensorStore
from opd.teachers.vocabulary import VocabularyMatch
from opd.trainer.metrics import TokenMetrics
from opd.trainer.policy import Policy
from opd.types import HiddenTarget, Prompt, Rollout, TopKTarget
from served import TOKENIZER, freeze_model, local_teacher, serving, soft_capped, teacher_model, watched

pytestmark = pytest.mark.timeout(120)

COMMON = VocabularyMatch(size=12, invalid_ids=(10,))
"""Ids 10 and 12 are no token of both."""
OBJECTIVES = {
    "reverse_kl": Objective(divergence="reverse_kl"),
    "forward_kl": Objective(divergence="forward_kl"),
    "jsd": Objective(divergence="generalized_jsd", beta=0.3),
    "top_k": Objective(support="teacher_top_k", top_k=4, tail="bucket"),
    "top_k_tail_sampled": Objective(support="teacher_top_k", top_k=4, tail="sampled"),
    "k1": Objective(support="sampled", estimator="k1", delivery="advantage"),
}


BFLOAT16_STEP = 2.0**-8
"""The relative error of one rounding."""


def rollouts(count: int = 10, seed: int = 0) -> list[Rollout]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        length = int(torch.randint(1, 12, (), generator=generator))
        prompt = Prompt(index=i, text="123456789"[: 1 + i % 7])
        found.append(
            Rollout(
                prompt=prompt,
                prompt_ids=tuple(int(c) for c in str(prompt.text)),
                response_ids=tuple(torch.randint(0, 10, (length,), generator=generator).tolist()),
                sampler_logp=(-1.0,) * length,
                finished=True,
                policy_version=0,
                id=i,
            )
        )
    return found


@contextmanager
def connected(*urls: str, **more: Any) -> Iterator[ExactServerTeacher]:
    pool = ServerPool(
        list(urls), section="teacher", timeout=10, deadline=8, patience=Patience(first_wait=0.01, longest_wait=0.05)
    )
    options: dict[str, Any] = {"vocabulary": COMMON, "wire": "float32", "name": "tiny"} | more
    try:
        yield ExactServerTeacher(pool, ask_model(pool), Renderer(TOKENIZER, name="tiny"), **options)
    finally:
        pool.close()


def loss_and_gradient(teacher: Any, objective: Objective, drawn: list[Rollout]) -> tuple[float, torch.Tensor]:
    """Of one student under this teacher's targets."""
    student = teacher_model(seed=1)
    kind = teacher.bind_objective(objective)
    batches = pack(drawn, teacher.score(drawn, kind), layout="right_padded", tokens_per_microbatch=64, pad_id=11)
    policy = Policy(student, vocabulary=COMMON, eos_ids=(12,), teacher_logits=teacher.logits)
    total = 0.0
    for batch in batches:
        loss = policy.loss(batch, objective, TokenMetrics())
        loss.backward()
        total += float(loss.detach())
    return total, torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_are_the_local_teachers_bit_for_bit_in_float32(name: str):
    """One request, and batches of the local teacher's size, so both models run the same operations on the same rows."""
    model = teacher_model(tie=False)
    local = local_teacher(model, vocabulary=COMMON, tokens_per_batch=64)
    expected_loss, expected = loss_and_gradient(local, OBJECTIVES[name], rollouts())
    with serving(freeze_model(model), max_tokens=64) as server, connected(server.url) as teacher:
        loss, gradient = loss_and_gradient(teacher, OBJECTIVES[name], rollouts())
    assert loss == expected_loss
    assert torch.equal(gradient, expected)
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["top_k", "top_k_tail_sampled", "k1"])
def test_loss_and_gradient_from_log_probs_are_the_local_teachers(name: str):
    """supply=top_k and sampled: log-probs are made row by row there, and of a whole batch here."""
    model, kind = teacher_model(tie=False), "sampled" if name == "k1" else "top_k"
    local = local_teacher(model, vocabulary=COMMON, tokens_per_batch=64, supply=kind)
    expected_loss, expected = loss_and_gradient(local, OBJECTIVES[name], rollouts())
    with serving(freeze_model(model), max_tokens=64) as server, connected(server.url, supply=kind) as teacher:
        loss, gradient = loss_and_gradient(teacher, OBJECTIVES[name], rollouts())
        assert server.metric("opd_requests_total", path="/v1/head", status="200") == 0
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)


class Rounded(LocalTeacher):
    """A local teacher whose hidden states are rounded to bfloat16."""

    def _hidden(self, *args: Any) -> torch.Tensor:
        return super()._hidden(*args).bfloat16().float()


@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
def test_loss_and_gradient_over_a_bfloat16_wire_are_those_of_rounded_hidden_states(name: str):
    model = teacher_model(tie=False)
    options: dict[str, Any] = {"vocabulary": COMMON, "pad_id": 11, "tokens_per_batch": 64}
    rounded = Rounded(model, Renderer(TOKENIZER, name="tiny"), **options)
    expected_loss, expected = loss_and_gradient(rounded, OBJECTIVES[name], rollouts())
    exact, _ = loss_and_gradient(local_teacher(model, vocabulary=COMMON), OBJECTIVES[name], rollouts())
    with serving(freeze_model(model), max_tokens=64) as server, connected(server.url, wire="bfloat16") as teacher:
        loss, gradient = loss_and_gradient(teacher, OBJECTIVES[name], rollouts())
    assert loss == expected_loss
    assert torch.equal(gradient, expected)
    assert 0 < abs(loss - exact) < BFLOAT16_STEP * exact


def test_logits_are_the_local_teachers():
    model = teacher_model()
    local = local_teacher(model, vocabulary=COMMON)
    with serving(freeze_model(model)) as server, connected(server.url) as teacher:
        for ours, theirs in zip(teacher.score(rollouts(), "hidden"), local.score(rollouts(), "hidden"), strict=True):
            assert isinstance(ours, HiddenTarget)
            assert isinstance(theirs, HiddenTarget)
            torch.testing.assert_close(teacher.logits(ours), local.logits(theirs), rtol=0, atol=1e-5)
        assert bool((teacher.logits(ours)[:, 10] == -torch.inf).all())
        assert teacher.logits(ours).shape[1] == COMMON.size
        assert teacher.exact_kind == "hidden"
        assert teacher.supplies == {"hidden", "dense", "top_k", "sampled"}


def test_ids_that_no_token_owns_are_scored_as_the_local_teacher_scores_them():
    """A sampler of somebody's own may draw rows of padding."""
    model = teacher_model()
    local = local_teacher(model, vocabulary=COMMON)
    strange = [replace(one, response_ids=(*one.response_ids[:-1], 40, 10)) for one in rollouts(4)]
    strange = [replace(one, sampler_logp=(-1.0,) * len(one.response_ids)) for one in strange]
    with serving(freeze_model(model)) as server, connected(server.url) as teacher:
        for kind in ("hidden", "top_k"):
            teacher.top_k = local.top_k = 4
            for ours, theirs in zip(teacher.score(strange, kind), local.score(strange, kind), strict=True):
                for name in ("hidden",) if kind == "hidden" else ("ids", "teacher_logp", "sampled_logp"):
                    torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=2e-6)


def test_the_head_is_fetched_once():
    with serving(freeze_model(teacher_model())) as server, connected(server.url) as teacher:
        heads = {
            id(t.head) for _ in range(3) for t in teacher.score(rollouts(), "hidden") if isinstance(t, HiddenTarget)
        }
        assert len(heads) == 1
        assert server.metric("opd_requests_total", path="/v1/head", status="200") == 1


@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_kept_targets_are_the_servers_and_cost_no_request(kind: Any, tmp_path: Path):
    with serving(freeze_model(teacher_model())) as server, connected(server.url) as teacher:
        cached = CachedTeacher(teacher, TensorStore(tmp_path))
        found = [cached.score(rollouts(), kind) for _ in range(2)]
        path = "/v1/hidden" if kind == "hidden" else "/v1/score"
        assert server.metric("opd_requests_total", path=path, status="200") == 1
        for first, again, plain in zip(*found, teacher.score(rollouts(), kind), strict=True):
            for name in ("hidden",) if kind == "hidden" else ("ids", "teacher_logp", "sampled_logp"):
                assert torch.equal(getattr(first, name), getattr(again, name))
                assert torch.equal(getattr(first, name), getattr(plain, name))


def test_many_rollouts_are_cut_into_requests_within_the_servers_limits():
    model = teacher_model()
    local = local_teacher(model, vocabulary=COMMON)
    drawn = rollouts(60)
    with (
        serving(freeze_model(model), max_request_rows=7, max_request_tokens=64, max_tokens=64) as server,
        connected(server.url) as teacher,
    ):
        found = teacher.score(drawn, "hidden")
        assert server.metric("opd_requests_total", path="/v1/hidden", status="200") >= 9
    for ours, theirs in zip(found, local.score(drawn, "hidden"), strict=True):
        torch.testing.assert_close(ours.hidden, theirs.hidden, rtol=0, atol=2e-6)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_pool_shares_the_work():
    one_model, two_model = (freeze_model(teacher_model()) for _ in range(2))
    with (
        serving(one_model, max_tokens=64) as one,
        serving(two_model) as two,
        connected(one.url, two.url) as teacher,
    ):
        teacher.score(rollouts(40), "hidden")
        for server in (one, two):
            assert server.metric("opd_requests_total", path="/v1/hidden", status="200") >= 1


@pytest.mark.parametrize("other", [{"seed": 3}, {"seed": 2, "hidden": 64}])
def test_a_pool_of_different_models_is_refused(other: dict[str, int]):
    with (
        serving(freeze_model(teacher_model())) as one,
        serving(freeze_model(teacher_model(**other), name="another")) as two,
        pytest.raises(ServerError, match="hold the same weights, dtype and tokenizer") as error,
        connected(one.url, two.url),
    ):
        pass
    assert one.url in str(error.value)
    assert "another" in str(error.value)


def test_another_model_under_way_stops_the_run():
    with serving(freeze_model(teacher_model())) as server, connected(server.url) as teacher:
        teacher.score(rollouts(), "hidden")
        server.service.model.__dict__["identity"] = "other"
        with pytest.raises(ServerError, match="serves another model than at the start of the run") as error:
            teacher.score(rollouts(), "hidden")
    assert "--resume" in str(error.value)


def test_another_model_at_the_same_address_is_never_a_target():
    """A server that comes back with other weights between two steps."""
    with serving(freeze_model(teacher_model())) as first, connected(first.url) as teacher:
        teacher.score(rollouts(), "hidden")
        port = int(first.url.rpartition(":")[2])
        first.server.should_exit = True
        first.wait_for(lambda: not first.server.servers or not any(s.is_serving() for s in first.server.servers))
        with (
            serving(freeze_model(teacher_model(seed=5)), port=port),
            pytest.raises(ServerError, match="serves another model than at the start"),
        ):
            teacher.score(rollouts(), "hidden")


@pytest.mark.parametrize("fault", ["order", "shift", "row", "id", "lost", "nan"])
def test_an_answer_about_other_rows_is_asked_for_again_and_never_used(fault: str, monkeypatch: pytest.MonkeyPatch):
    """The server mixes up its rows once; the next answer is right."""
    from opd.serving import app as serving_app

    write, broken = serving_app.write_answer, []

    def wrong(tensors: Any, receipts: Any, identity: str) -> bytes:
        if broken or not receipts:
            return write(tensors, receipts, identity)
        broken.append(fault)
        hidden = tensors["hidden"].clone()
        if fault == "order":
            receipts = [receipts[1], receipts[0], *receipts[2:]]
        if fault == "shift":
            hidden = hidden[1:]
        if fault == "row":
            receipts = [replace(receipts[0], digest=receipts[1].digest), *receipts[1:]]
        if fault == "id":
            receipts = [replace(receipts[0], id="other"), *receipts[1:]]
        if fault == "lost":
            receipts = receipts[:-1]
        if fault == "nan":
            hidden[0, 0] = torch.nan
        return write({"hidden": hidden}, receipts, identity)

    monkeypatch.setattr(serving_app, "write_answer", wrong)
    model = teacher_model()
    local = local_teacher(model, vocabulary=COMMON)
    with serving(freeze_model(model)) as server, connected(server.url) as teacher:
        found = teacher.score(rollouts(), "hidden")
    assert broken == [fault]
    for ours, theirs in zip(found, local.score(rollouts(), "hidden"), strict=True):
        torch.testing.assert_close(ours.hidden, theirs.hidden, rtol=0, atol=2e-6)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_head_that_is_damaged_on_the_way_is_fetched_again(monkeypatch: pytest.MonkeyPatch):
    from opd.serving import app as serving_app

    stream, broken = serving_app.stream, []

    def damaged(tensors: Any, metadata: Any) -> Any:
        if not broken:
            broken.append(True)
            tensors = {name: tensor + 1 for name, tensor in tensors.items()}
        return stream(tensors, metadata)

    monkeypatch.setattr(serving_app, "stream", damaged)
    model = teacher_model()
    with serving(freeze_model(model)) as server, connected(server.url) as teacher:
        assert teacher.head is not None
        assert torch.equal(teacher.head.weight, model.get_output_embeddings().weight)
    assert broken


def test_a_busy_server_is_asked_again():
    model = watched(freeze_model(teacher_model()))
    with serving(model, max_queue_tokens=1, max_tokens=64) as server, connected(server.url) as teacher:
        teacher.pool.deadline = 60
        found = teacher.score(rollouts(60), "hidden")
        assert server.metric("opd_refusals_total", reason="queue") > 0
    assert [len(t) for t in found] == [len(r.response_ids) for r in rollouts(60)]


def test_a_rollout_that_the_server_cannot_read_is_named():
    with serving(freeze_model(teacher_model()), max_tokens=10) as server, connected(server.url) as teacher:
        long = replace(rollouts(1)[0], response_ids=(1,) * 20)
        with pytest.raises(DataError, match=r"Prompt 0 and its response take 20 tokens.*--max-tokens 20"):
            teacher.score([long], "hidden")


def test_a_supply_that_a_soft_capped_model_cannot_give_is_refused():
    with serving(freeze_model(soft_capped())) as server:
        with connected(server.url) as teacher:
            assert teacher.supplies == {"top_k", "sampled"}
            assert teacher.exact_kind is None
            assert isinstance(teacher.score(rollouts(2), "top_k")[0], TopKTarget)
        with pytest.raises(ObjectiveError, match="soft-cap"), connected(server.url, supply="hidden"):
            pass
